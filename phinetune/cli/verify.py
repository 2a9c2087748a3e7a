"""`phinetune verify-resume`"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from phinetune.errors import RunError
from phinetune.recipe import load_recipe


def run_verify_resume(recipe: Path, overrides: Sequence[str], seed: int | None, as_json: bool) -> None:
    loaded, words = load_recipe(recipe, overrides)  # what is wrong with it is said at once
    for word in words:
        print(word, file=sys.stderr)

    from phinetune.cli.signals import tidied_up
    from phinetune.measure.verify import STEPS, verify_resume
    from phinetune.model import pick_device

    if not as_json:
        print(f"running {recipe} for {STEPS} steps, then again, killed in between")
    exactly = pick_device(loaded.training_config.use_cpu).type == "cpu"
    with tidied_up(), tempfile.TemporaryDirectory(prefix="phinetune-verify-") as folder:
        found = verify_resume(recipe, overrides, Path(folder), seed, exactly)
    if as_json:
        print(json.dumps(found))
    else:
        print(f"killed behind step {found['killed_behind']}, resumed behind step {found['resumed_behind']}")
        for step in found["steps"]:
            again = "missing" if step["resumed_loss"] is None else f"{step['resumed_loss']:.6f}"
            print(f"  step {step['step']}  loss {step['loss']:.6f}  {again}  {_word(step['equal'])}")
        files = found["files"] if exactly else {}
        for name, (whole, cut) in {"tokens trained on": found["batches"], **files}.items():
            print(f"  {name}  {whole[:16]}  {cut[:16]}  {_word(whole == cut)}")
    if not found["equal"]:
        raise RunError("verify-resume", "the resumed run differs from the whole one", "report it with this output")
    if not as_json:
        how = "bit for bit" if exactly else "to 1e-3 of each loss: a GPU's sums have no fixed order"
        print(f"the resumed run is the whole one, {how}")


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"
