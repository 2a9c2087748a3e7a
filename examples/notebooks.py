"""Runs the guide's examples, on the embedded model, and keeps what they print: each script as a notebook beside it.

    python examples/notebooks.py [NAME …]

What they write goes to runs/examples.  MODEL and DATA are passed on.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent / "guide"
WORK = Path(__file__).parents[1] / "runs" / "examples"


def main(names: list[str]) -> None:
    os.environ.setdefault("MODEL", "smollm2")
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "WANDB_SILENT": "true", "PYTHONWARNINGS": "ignore:IProgress"}
    WORK.mkdir(parents=True, exist_ok=True)
    for script in sorted(EXAMPLES.glob("*.py")):
        if names and script.stem not in names:
            continue
        begin = time.perf_counter()
        print(f"{script.stem} …", flush=True)
        notebook = as_notebook(script)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(WORK)}}).execute()
        tidy(notebook)
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.stem}: {time.perf_counter() - begin:.0f} s", flush=True)


def as_notebook(script: Path) -> nbformat.NotebookNode:
    """A script's cells, which `# %%` begin."""
    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Outputs without what is of this machine or this minute: pieces of one stream together, no times of cells."""
    home = str(Path(__file__).resolve().parents[1])
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.name, output.text = "stdout", output.text.replace(f"{home}/", "")
                if outputs and outputs[-1].output_type == "stream":
                    outputs[-1].text += output.text
                    continue
            outputs.append(output)
        if "outputs" in cell:
            cell.outputs = outputs


if __name__ == "__main__":
    main(sys.argv[1:])
