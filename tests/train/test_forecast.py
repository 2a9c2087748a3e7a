"""`phinetune plan`: what it says of a small model; benchmarks/reliability has it beside real runs of real ones."""

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_model

from phinetune.errors import RecipeError
from phinetune.recipe import make_recipe
from phinetune.train.forecast import Needs, Room, _device, forecast


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, smollm2_tokenizer):
    folder = tmp_path_factory.mktemp("plan")
    tiny_model("llama", "sdpa", num_hidden_layers=10, hidden_size=128).save_pretrained(folder / "model")
    smollm2_tokenizer.save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"Count to {i}."}, {"role": "assistant", "content": " one" * i}]}
        for i in range(5, 45)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps({
            "model": str(folder / "model"), "data": {"train": str(folder / "chats.jsonl")},
            "model_kwargs": {"dtype": "float32"},
            "training_config": {"output_dir": str(folder / "run"), "max_steps": 10, "use_cpu": True, "save_steps": 5,
                                "save_strategy": "steps"},
            "peft_config": {"r": 4, "target_modules": ["q_proj"]},
        })
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def said(recipe):
    command = [sys.executable, "-m", "phinetune", "plan", str(recipe), "--json"]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_what_can_be_counted_by_hand(said):
    assert said["layers"] == 10
    assert said["steps"] == 10
    assert said["fits"]
    assert said["advice"] == []
    trained = 10 * 4 * (128 + 64) * 4  # layers · r · (in + out of q_proj) · bytes
    assert said["gb"]["adapters"] == pytest.approx(trained / 1e9, abs=1e-3)
    layer = 128 * 64 * 2 + 2 * 128 * 32 + 3 * 128 * 96 + 2 * 128
    weights = 4 * (10 * layer + 2 * 49152 * 128 + 128)
    assert said["gb"]["weights"] + said["mapped_gb"] == pytest.approx(weights / 1e9, abs=2e-3)
    assert sum(said["gb"].values()) == pytest.approx(said["peak_gb"], abs=0.01)
    assert said["disk_gb"] < 0.01


@pytest.mark.slow
def test_the_run_takes_what_was_said(recipe, said):
    command = [sys.executable, "-m", "phinetune", "train", str(recipe), "--overwrite"]
    for _ in range(2):  # the first of all runs has a compiler beside it
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert ran.returncode == 0, ran.stderr
    summary = json.loads((recipe.parent / "run" / "summary.json").read_text())
    assert said["peak_gb"] == pytest.approx(summary["peak_gb"], rel=0.1)


def test_a_line_through_two_measurements():
    few = Needs(1, loaded=2, weights=10, mapped=0, trained=1, stepping=5, rehearsed=8, checkpoint=3, seconds=0.2)
    more = Needs(1, loaded=4, weights=30, mapped=0, trained=3, stepping=9, rehearsed=10, checkpoint=9, seconds=0.6)
    at = few.with_layers(1, more, 3, 11)
    assert at == Needs(
        1,
        loaded=12,
        weights=110,
        mapped=0,
        trained=11,
        stepping=25,
        rehearsed=18,
        checkpoint=33,
        seconds=pytest.approx(2.2),
    )
    assert at.peak == 25
    assert more.peak == 10, "a layer that is merged needs more than its steps"


def test_mapped_weights_need_memory_and_are_no_part_of_the_peak():
    needs = Needs(1, loaded=2, weights=10, mapped=8, trained=1, stepping=7, rehearsed=6, checkpoint=3, seconds=0.2)
    assert Room(free=15, most=7).holds(needs), "max_memory_gb is counted as a run's peak is"
    assert not Room(free=14, most=7).holds(needs)
    assert not Room(free=15, most=6).holds(needs)


def test_devices():
    assert _device("16GB", use_cpu=True) == (16e9, None)
    assert _device("H100", use_cpu=True) == (80e9, 989e12)
    with pytest.raises(RecipeError, match=r"--device abacus: is not known; name one of t4"):
        _device("abacus", use_cpu=True)


@pytest.mark.slow
def test_a_machine_that_is_too_small(recipe):
    from phinetune.recipe import load_recipe

    found = forecast(load_recipe(recipe)[0], "0.1GB")
    assert not found["fits"]
    assert found["recomputed_layers"] == found["layers"], "what can be recomputed is"
    assert found["advice"][-1] == "a smaller model"
    assert [line for line in found["advice"] if "load_in_8bit" in line or "load_in_4bit" in line]
    found = forecast(load_recipe(recipe, ["load_in_4bit=true"])[0], "0.1GB")
    assert not [line for line in found["advice"] if "load_in_" in line], "it is in 4 bits"


def test_standard_input_cannot_be_planned():
    recipe, _ = make_recipe({"model": "smollm2", "data": {"train": "-"}})
    with pytest.raises(RecipeError, match="standard input"):
        forecast(recipe)
