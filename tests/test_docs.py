"""What README and docs show is run: commands, Python, recipes; and the errors that they explain are in the code.

Each page has a folder of its own, with 40 chats in chats.jsonl and a small random Phi-3 where microsoft/Phi-3-mini-4k-
instruct is looked for; another small model stands for the embedded one.  A block behind `<!-- not run: why -->` isn't
run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from commands import forked, phinetune, run_code
from conftest import ROOT, tiny_model

from phinetune import finetune
from phinetune.recipe import make_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
BLOCK = re.compile(r"(?P<mark><!-- not run: [^>]+ -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)\n```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    def commands(self) -> list[str]:
        """Its lines that call phinetune, without what is said of them."""
        lines = [] if self.language else self.text.splitlines()
        return [re.split(r"\s+#", line)[0].strip() for line in lines if line.startswith("phinetune ")]


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(block["language"], block["text"]) for block in found if not block["mark"]]


def of_pages(*languages: str) -> list:
    pages = [page for page in PAGES if any(b.language in languages for b in blocks(page))]
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_llama_folder):
    """What pages call runs/mine, runs/a and runs/b."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [
        {"messages": [{"role": "user", "content": f"{i} and 1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(20)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    finetune(
        model=str(tiny_llama_folder),
        train=str(folder / "rows.json"),
        eval=0.2,
        training_config={"output_dir": str(folder / "run"), "max_steps": 2, "disable_tqdm": True},
    )
    return folder / "run"


@pytest.fixture
def page_folder(tmp_path, chats, tiny_llama_folder, smollm2_tokenizer):
    """Where what a page shows is run."""
    folder = tmp_path / PHI3
    tiny_model("phi3", "sdpa").save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    shutil.copytree(tiny_llama_folder, tmp_path / "small")
    assert chats == tmp_path / "chats.jsonl"
    return tmp_path


def with_small_model(text: str) -> str:
    """The embedded model takes minutes; so does what `doctor` trains."""
    return re.sub(r"\bsmollm2\b", "./small", text).replace("phinetune doctor", "phinetune doctor --no-training")


def by_nobody(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """The command line without a token or a login, and offline; not in a fork, since huggingface_hub reads its
    variables when it is imported."""
    nobody = {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command, env = [sys.executable, "-m", "phinetune", *arguments], {**os.environ, **nobody}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in of_pages("") if any(b.commands() for b in blocks(p.values[0]))])
def test_the_commands_of_a_page_run(page, page_folder, finished_run):
    for name in ("mine", "a", "b"):
        shutil.copytree(finished_run, page_folder / "runs" / name)
    recipe = page_folder / "recipe.yaml"
    if not any("phinetune init" in block.text for block in blocks(page)):
        phinetune("init", "chats.jsonl", cwd=page_folder)
    for command in (command for block in blocks(page) for command in block.commands()):
        if recipe.is_file():
            text = with_small_model(recipe.read_text(encoding="utf-8")).replace("num_train_epochs: 3", "max_steps: 4")
            recipe.write_text(text, encoding="utf-8")
        arguments = shlex.split(with_small_model(command))[1:]
        pushes = command.startswith("phinetune push") and "--dry-run" not in command
        said = by_nobody(arguments, page_folder) if pushes else phinetune(*arguments, cwd=page_folder, input="")
        assert said.returncode == (2 if pushes else 0), f"{command}\n{said.stdout}{said.stderr}"
        assert not pushes or "access token" in said.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", of_pages("python"))
def test_the_python_of_a_page_runs(page, page_folder):
    code = "\n".join(block.text for block in blocks(page) if block.language == "python")
    (page_folder / "page.py").write_text(with_small_model(code), encoding="utf-8")
    said = forked(run_code, "page.py", cwd=page_folder)
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize("page", of_pages("yaml", "json"))
def test_the_recipes_and_rows_of_a_page_are_read(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            given = yaml.safe_load(block.text)
            data = {"train": "chats.jsonl", **given.get("data", {})}
            make_recipe({"model": "x", **given, "data": data})


def test_the_errors_that_are_explained_are_those_of_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "phinetune").rglob("*.py"))
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("## By error text")[1]
    explained = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(explained) > 20
    assert [text for text in explained if text not in code] == []


def test_both_languages_of_the_guide_show_the_same_code():
    def bare(page):
        return [re.sub(r"\s*#.*|runs/\w+", "", b.text) for b in blocks(ROOT / "docs" / page)]

    assert bare("guide.md") == bare("gabay.md")
