"""Names of many releases of transformers, TRL and PEFT, as their documentation has them: none is unknown."""

import pytest

from phinetune.errors import RecipeError
from phinetune.recipe import make_recipe

IGNORED, REFUSED = "is ignored: ", "is not supported"

# (section, name, a value, where it is found in the recipe, or what is said of it)
NAMES = [
    # transformers 4.0
    ("training_config", "evaluation_strategy", "epoch", "training_config.eval_strategy"),
    ("training_config", "per_gpu_train_batch_size", 3, "training_config.per_device_train_batch_size"),
    ("training_config", "no_cuda", True, "training_config.use_cpu"),
    ("training_config", "adam_epsilon", 1e-7, "training_config.adam_epsilon"),
    ("training_config", "fp16_opt_level", "O2", IGNORED),
    ("training_config", "tpu_metrics_debug", True, IGNORED),
    # 4.20
    ("training_config", "fp16_backend", "amp", IGNORED),
    ("training_config", "half_precision_backend", "apex", IGNORED),
    ("training_config", "sharded_ddp", "simple", IGNORED),
    ("training_config", "group_by_length", True, IGNORED),
    ("training_config", "torchdynamo", "eager", IGNORED),
    ("training_config", "label_smoothing_factor", 0.1, REFUSED),
    # 4.37
    ("training_config", "include_tokens_per_second", True, IGNORED),
    ("training_config", "dispatch_batches", True, IGNORED),
    ("training_config", "save_safetensors", False, IGNORED),
    ("training_config", "neftune_noise_alpha", 5, REFUSED),
    # 4.46
    ("training_config", "eval_strategy", "epoch", "training_config.eval_strategy"),
    ("training_config", "use_liger_kernel", True, IGNORED),
    # TRL 0.7
    ("training_config", "max_seq_length", 300, "data.max_length"),
    ("training_config", "packing", True, "training_config.packing"),
    ("training_config", "dataset_batch_size", 500, IGNORED),
    ("training_config", "dataset_text_field", "text", IGNORED),
    ("training_config", "chars_per_token", 3.6, IGNORED),
    # 0.12
    ("training_config", "use_liger", True, IGNORED),
    # 0.18
    ("training_config", "activation_offloading", True, IGNORED),
    ("training_config", "eos_token", "<|im_end|>", IGNORED),
    # 1.0
    ("training_config", "max_length", 300, "data.max_length"),
    ("training_config", "truncation_mode", "keep_end", IGNORED),
    # PEFT 0.3
    ("peft_config", "modules_to_save", ["lm_head"], "peft_config.modules_to_save"),
    ("peft_config", "fan_in_fan_out", True, IGNORED),
    # 0.8
    ("peft_config", "layers_pattern", ["layers"], "peft_config.layers_pattern"),
    ("peft_config", "use_rslora", True, "peft_config.use_rslora"),
    ("peft_config", "megatron_config", {"tensor_model_parallel_size": 2}, IGNORED),
    ("peft_config", "loftq_config", {"loftq_bits": 4}, REFUSED),
    # 0.14 and 0.17
    ("peft_config", "eva_config", {"rho": 2.0}, REFUSED),
    ("peft_config", "lora_bias", True, REFUSED),
    ("peft_config", "target_parameters", ["mlp.experts.down_proj"], REFUSED),
]


@pytest.mark.parametrize(("section", "name", "value", "outcome"), NAMES)
def test_a_name_of_any_release_is_honoured_mapped_or_reported(section, name, value, outcome):
    given = {"model": "x", "data": {"train": "x"}, section: {name: value}}
    if outcome == REFUSED:
        with pytest.raises(RecipeError, match=rf"{section}\.{name}=.*{REFUSED}") as error:
            make_recipe(given)
        assert "unknown" not in str(error.value)
        return
    recipe, words = make_recipe(given)
    if outcome == IGNORED:
        (word,) = words
        assert word.startswith(f"{section}.{name}={value!r} {IGNORED}")
        return
    owner, current = outcome.split(".")
    assert getattr(getattr(recipe, owner), current) == value
    assert words == ([] if outcome == f"{section}.{name}" else [f"{section}.{name} is read as {outcome}={value}"])
