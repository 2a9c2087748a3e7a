"""`phinetune plan`: what it says of a small model; benchmarks/reliability has it beside real runs of real ones."""

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_model
from typer.testing import CliRunner

from phinetune.cli.app import app
from phinetune.errors import RecipeError
from phinetune.measure import forecast as room
from phinetune.measure.forecast import Needs, Room, _device, _Lines, forecast
from phinetune.model import adapt_model, load_config
from phinetune.recipe import load_recipe, make_recipe


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
    few = Needs(
        1, loaded=2, parameters=5, weights=10, mapped=0, trained=1, stepping=5, rehearsed=8, checkpoint=3, seconds=0.2
    )
    more = Needs(
        1, loaded=4, parameters=15, weights=30, mapped=0, trained=3, stepping=9, rehearsed=10, checkpoint=9, seconds=0.6
    )
    at = few.with_layers(1, more, 3, 11)
    assert at == Needs(
        1,
        loaded=12,
        parameters=55,
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
    needs = Needs(
        1, loaded=2, parameters=5, weights=10, mapped=8, trained=1, stepping=7, rehearsed=6, checkpoint=3, seconds=0.2
    )
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
    found = forecast(load_recipe(recipe)[0], "0.1GB")
    assert not found["fits"]
    assert found["recomputed_layers"] == found["layers"], "what can be recomputed is"
    assert found["advice"][-1] == "a smaller model"
    assert [line for line in found["advice"] if "load_in_8bit" in line or "load_in_4bit" in line]
    found = forecast(load_recipe(recipe, ["load_in_4bit=true"])[0], "0.1GB")
    assert not [line for line in found["advice"] if "load_in_" in line], "it is in 4 bits"


KEPT, HEAD, LAYER = 3_000_000, 12_000_000, 1_000_000  # bytes; parameters


@pytest.fixture
def asked(monkeypatch):
    """The recipes that are measured, of a model whose numbers are round: layers of `LAYER` parameters beside `HEAD`."""
    asked = []

    def measure(recipe, layers, recomputed):
        asked.append(recipe)
        parameters, element = HEAD + layers * LAYER, 2 if recipe.model_kwargs.dtype == "bfloat16" else 4
        trained, kept = 3072 * layers, 0 if recomputed else KEPT * layers
        loaded = 1e8 + element * parameters + trained
        return Needs(
            1e8, loaded, parameters, element * parameters, mapped=0, trained=trained, checkpoint=4 * trained,
            stepping=loaded + 3 * trained + kept, rehearsed=loaded, seconds=1e-5 * layers,
        )  # fmt: skip

    monkeypatch.setattr(room, "_in_a_process", measure)
    return asked


ONE = 4 * (128 + 64) * 4  # r · (in + out of q_proj) · bytes


@pytest.mark.parametrize(
    ("peft", "trained"),
    [
        ({}, 10 * 3072),  # as measured
        ({"layers_to_transform": [8, 9]}, 2 * ONE),
        ({"layers_to_transform": 9, "layers_pattern": "layers"}, ONE),
        ({"target_modules": ["layers.9.self_attn.q_proj"]}, ONE),
        ({"target_modules": r".*\.(7|8|9)\..*q_proj"}, 3 * ONE),
        ({"exclude_modules": r".*\.9\..*"}, 9 * ONE),
        ({"rank_pattern": {"layers.9.self_attn.q_proj": 6}}, 9 * ONE + ONE * 6 // 4),
        ({"modules_to_save": ["layers.9.mlp"]}, 10 * ONE + 3 * 128 * 96 * 4),
    ],
)
def test_layers_that_are_adapted_by_their_numbers(recipe, asked, peft, trained):
    given = {"r": 4, "target_modules": ["q_proj"], **peft}
    changed, _ = load_recipe(recipe, [f"peft_config.{name}={json.dumps(value)}" for name, value in given.items()])
    lines = _Lines(changed, load_config(changed.model, changed.model_kwargs))
    needs = lines.at(0)
    assert needs.trained == trained
    assert needs.stepping - needs.loaded == pytest.approx(3 * trained + 10 * KEPT), "gradients, moments, activations"
    assert lines.activations(0) == pytest.approx(10 * KEPT)
    assert needs.checkpoint >= 4 * trained
    for measured in asked:
        few = tiny_model("llama", num_hidden_layers=2, hidden_size=128)
        assert adapt_model(few, measured.peft_config, seed=0) == [
            f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)
        ]


def test_the_layers_of_a_language_model_beside_others(recipe):
    from transformers import Gemma3Config

    assert _Lines(load_recipe(recipe)[0], Gemma3Config(text_config={"num_hidden_layers": 7})).layers == 7


def test_names_that_are_nowhere_in_the_whole_model_are_the_recipes_fault(recipe, asked):
    changed, _ = load_recipe(recipe, ["peft_config.target_modules=[layers.10.self_attn.q_proj]"])
    with pytest.raises(RecipeError, match=r"nothing in the model is called 'layers\.10\.self_attn\.q_proj'"):
        forecast(changed)


def test_on_a_gpu_auto_is_bfloat16_and_time_goes_by_parameters(recipe, asked):
    changed, _ = load_recipe(recipe, ["model_kwargs.dtype=auto"])
    found = forecast(changed, "rtx4090")
    assert {measured.model_kwargs.dtype for measured in asked} == {"bfloat16"}
    parameters = HEAD + 10 * LAYER
    assert found["gb"]["weights"] == pytest.approx(2 * parameters / 1e9, abs=1e-3)
    a_token = 4 * parameters / (165e12 * room.SHARE_ON_A_GPU)  # forward and back, by the data sheet
    needs = room._on_gpu(_Lines(asked[0], load_config(changed.model, changed.model_kwargs)).at(0), 165e12, 0)
    assert needs.seconds == pytest.approx(a_token)
    in_4_bits = room._on_gpu(room.replace(needs, weights=needs.weights / 4), 165e12, 0)
    assert in_4_bits.seconds == pytest.approx(a_token), "a weight is multiplied as often in fewer bits"
    asked.clear()
    forecast(changed, "16GB")
    assert {measured.model_kwargs.dtype for measured in asked} == {"auto"}, "that is this processor"


def test_a_gpu_holds_what_is_mapped_here_and_multiplies_at_its_own_rate():
    needs = Needs(
        process=1e9, loaded=4e9, parameters=3.8e9, weights=7.6e9, mapped=7e9, trained=1e8, stepping=4.5e9,
        rehearsed=5e9, checkpoint=3e8, seconds=0.02,
    )  # fmt: skip
    moved = room._moved(needs)
    assert moved.peak == pytest.approx(11.6e9), "5 behind the rehearsal, 7 mapped, 0.6 of CUDA's; not the process's 1"
    assert (moved.process, moved.mapped, moved.checkpoint) == (0.6e9, 0, 3e8)
    there = room._on_gpu(needs, 165e12, recomputed=0.5)
    assert there.peak == moved.peak
    assert there.seconds == pytest.approx(5 * 3.8e9 / 59.4e12), "forward, back, half of forward again; 36 % of the rate"


def test_a_plan_for_a_gpu_by_hand(recipe, monkeypatch):
    def measure(recipe, layers, recomputed):
        return Needs(
            process=3e9, loaded=5e9, parameters=1e12, weights=2e9, mapped=1e9, trained=0, rehearsed=0, checkpoint=0,
            stepping=6e9 + (0 if recomputed else 2e9 * layers), seconds=1.0,
        )  # fmt: skip

    def plan(device):
        ran = CliRunner().invoke(app, ["plan", str(recipe), "--device", device, "--json"])
        assert ran.exit_code == 0, ran.output
        found = json.loads(ran.stdout)
        assert found["fits"]
        return found, (found["recomputed_layers"], found["peak_gb"], found["mapped_gb"], found["free_gb"])

    monkeypatch.setattr(room, "_in_a_process", measure)
    monkeypatch.setattr("phinetune.cli.quiet.quiet_libraries", lambda: None)  # it would last
    # Ten layers keep 20 GB beside 6: with 1 mapped, 0.6 of CUDA's and without 3 of the process 24.6, 2 less a layer.
    found, memory = plan("rtx4090")
    assert memory == (1, 22.6, 0, 24)
    assert found["seconds"] == pytest.approx(found["tokens"] * 4.2e12 / 59.4e12, rel=0.01), "a tenth twice forward"
    found, memory = plan("24GB")  # a processor: 26, and 1 mapped
    assert memory == (2, 22, 1, 24)
    assert found["seconds"] == found["tokens"]


def test_advice_goes_by_what_a_weight_takes(recipe, asked):
    found = forecast(load_recipe(recipe)[0], "0.01GB")  # in float32
    assert found["advice"][0] == "model_kwargs.dtype=bfloat16: about 0.0 GB less"
    needs = Needs(0, 0, 3.8e9, 4 * 3.8e9, mapped=0, trained=0, stepping=0, rehearsed=0, checkpoint=0, seconds=0)
    said = room._advice(load_recipe(recipe)[0], found, needs, 3.6e9, 40)
    assert said[0] == "model_kwargs.dtype=bfloat16: about 7.6 GB less"
    assert "model_kwargs.load_in_8bit=true: about 10.8 GB less" in said, "of the layers' four bytes one stays"
    said = room._advice(load_recipe(recipe)[0], found, room.replace(needs, weights=2 * 3.8e9), 3.6e9, 40)
    assert not [line for line in said if "dtype" in line]
    assert "model_kwargs.load_in_8bit=true: about 3.6 GB less" in said
    assert "model_kwargs.load_in_4bit=true: about 5.3 GB less, by bitsandbytes" in said


def test_advice_for_a_disk_names_what_is_not_so_already(recipe, asked):
    found = {**forecast(load_recipe(recipe)[0]), "disk_gb": 2.0, "disk_free_gb": 1.0}
    needs = Needs(0, 0, 1, 2, mapped=0, trained=0, stepping=0, rehearsed=0, checkpoint=0, seconds=0)
    elsewhere = "training_config.output_dir=… on a disk with more room"
    assert room._advice(load_recipe(recipe)[0], found, needs, 1, 40) == [elsewhere]
    many, _ = load_recipe(recipe, ["save_total_limit=5"])
    fewer = "training_config.save_total_limit=2: only the newest checkpoints are kept"
    assert room._advice(many, found, needs, 1, 40) == [fewer, elsewhere]


def test_no_more_is_free_than_there_is(monkeypatch):
    """Off Linux all memory is called free, what this process has taken of it too."""
    for name, size in {"memory_free": 16e9, "memory_in_use": 2e9, "memory_total": 16e9}.items():
        monkeypatch.setattr(room, name, lambda *device, size=size: size)
    assert _device(None, use_cpu=True) == (16e9, None)


def test_a_measurement_ends_with_who_asked_for_it(recipe):
    command = [sys.executable, "-m", "phinetune.measure.forecast", str(recipe), "2"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")


def test_standard_input_cannot_be_planned():
    recipe, _ = make_recipe({"model": "smollm2", "data": {"train": "-"}})
    with pytest.raises(RecipeError, match="standard input"):
        forecast(recipe)
