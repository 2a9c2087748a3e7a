"""A two-layer Phi-3 of random weights with SmolLM2's tokenizer: `small_phi3.py FOLDER` makes it."""

import sys
from pathlib import Path


def make(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import tiny_model

    from phinetune.model import load_tokenizer
    from phinetune.recipe import ModelKwargs

    tiny_model("phi3", "sdpa").save_pretrained(folder)
    load_tokenizer("smollm2", ModelKwargs()).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
