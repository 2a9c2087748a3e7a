"""`phinetune explain`: each setting, its value, where that came from, what it does."""

import json

import pytest
from commands import phinetune

from phinetune.recipe import Recipe, load_recipe, make_recipe
from phinetune.recipe.explain import explain
from phinetune.recipe.names import SECTIONS

RECIPE = """
model: smollm2
model_kwargs: {torch_dtype: bfloat16, token: hf_secret}
data: {train: chats.jsonl}
training_config: {lr: 1.0e-3, max_seq_length: 512, seed: 7, fp16: true}
peft_config: {r: 8}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_where_each_value_came_from(recipe):
    loaded, words = load_recipe(recipe, ["peft_config.alpha=16", "r=4", "num_train_epochs=2"])
    found = {setting.path: (setting.value, setting.origin) for setting in explain(loaded)}
    assert found["model"] == ("smollm2", "recipe")
    assert found["model_kwargs.dtype"] == ("bfloat16", "recipe, as torch_dtype")
    assert found["training_config.learning_rate"] == (1e-3, "recipe, as lr")
    assert found["data.max_length"] == (512, "recipe, as training_config.max_seq_length")
    assert found["peft_config.lora_alpha"] == (16, "command line, as alpha")
    assert found["peft_config.r"] == (4, "command line")
    assert found["training_config.num_train_epochs"] == (2, "command line")
    assert found["training_config.data_seed"] == (7, "derived from seed")
    assert found["training_config.weight_decay"] == (0.0, "default")
    assert any("fp16" in word and "ignored" in word for word in words)


def test_every_setting_is_listed_and_says_what_it_does(recipe):
    settings = explain(load_recipe(recipe)[0])
    expected = [
        path
        for key in Recipe.model_fields
        for path in ([f"{key}.{name}" for name in SECTIONS[key].model_fields] if key in SECTIONS else [key])
    ]
    assert [setting.path for setting in settings] == expected
    assert all(len(setting.what) > 8 for setting in settings)


def test_a_token_is_never_shown(recipe):
    for more in ([], ["--json"], ["--changed"]):
        said = phinetune("explain", recipe, *more).stdout
        assert "hf_secret" not in said
        assert "learning_rate" in said
    assert "weight_decay" not in phinetune("explain", recipe, "--changed").stdout
    assert {s["path"] for s in json.loads(phinetune("explain", recipe, "--json").stdout)["settings"]}


def test_a_wrong_recipe_is_refused_as_by_train(recipe):
    said = phinetune("explain", recipe, "training_config.learnin_rate=1")
    assert said.returncode == 2
    assert "did you mean learning_rate" in said.stderr


def test_what_python_gives_and_what_a_run_finds_out():
    recipe, _ = make_recipe({"model": "smollm2", "data": {"train": "a.jsonl"}}, by="Python")
    decided = recipe.derived("model_kwargs", "dtype", "float32", "this machine, for auto")
    found = {setting.path: (setting.value, setting.origin) for setting in explain(decided)}
    assert found["data.train"] == ("a.jsonl", "Python")
    assert found["model_kwargs.dtype"] == ("float32", "derived from this machine, for auto")
    assert recipe.model_kwargs.dtype == "auto"
