"""Every name a recipe may use: ours, what older releases called it, and what has no counterpart here.

Collected from TrainingArguments (transformers 4.0 to 5.23), SFTConfig and SFTTrainer's own arguments
(TRL 0.7 to 1.16) and LoraConfig (PEFT 0.3 to 0.21).  A name of theirs is honoured, mapped with a word,
or warned about; any other is an error with the nearest name.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from phinetune.errors import RecipeError
from phinetune.recipe.schema import DataConfig, EvaluationConfig, ModelKwargs, PeftConfig, Section, TrainingConfig

SECTIONS: dict[str, type[Section]] = {
    "model_kwargs": ModelKwargs,
    "data": DataConfig,
    "training_config": TrainingConfig,
    "peft_config": PeftConfig,
    "evaluation": EvaluationConfig,
}

Convert = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _ratio(value: Any) -> Any:
    return 1 - 1e-9 if value == 1 else value  # all of the run, where warmup_steps: 1 is one step


def _adafactor(value: Any) -> str:
    return "adafactor" if value else "adamw_torch"


def _supervise(value: Any) -> str:
    return "assistant" if value else "completion"  # of rows with a prompt TRL learns the completion even so


def _completion(value: Any) -> str:
    return "assistant" if value is None else "completion" if value else "all"


# name -> (where it went, how its value is translated)
MAPPED: dict[str, dict[str, tuple[str, Convert]]] = {
    "training_config": {
        "evaluation_strategy": ("training_config.eval_strategy", _same),
        "warmup_ratio": ("training_config.warmup_steps", _ratio),
        "per_gpu_train_batch_size": ("training_config.per_device_train_batch_size", _same),
        "per_gpu_eval_batch_size": ("training_config.per_device_eval_batch_size", _same),
        "no_cuda": ("training_config.use_cpu", _same),
        "adafactor": ("training_config.optim", _adafactor),
        "max_length": ("data.max_length", _same),
        "max_seq_length": ("data.max_length", _same),
        "cutoff_len": ("data.max_length", _same),
        "assistant_only_loss": ("data.supervise", _supervise),
        "completion_only_loss": ("data.supervise", _completion),
        "activation_checkpointing": ("training_config.gradient_checkpointing", _same),
        "activation_checkpointing_kwargs": ("training_config.gradient_checkpointing_kwargs", _same),
        "dataset_num_proc": ("data.num_proc", _same),
        "lr": ("training_config.learning_rate", _same),
        "epochs": ("training_config.num_train_epochs", _same),
        "batch_size": ("training_config.per_device_train_batch_size", _same),
    },
    "peft_config": {
        "lora_r": ("peft_config.r", _same),
        "lora_rank": ("peft_config.r", _same),
        "rank": ("peft_config.r", _same),
        "alpha": ("peft_config.lora_alpha", _same),
        "dropout": ("peft_config.lora_dropout", _same),
        "lora_target": ("peft_config.target_modules", _same),
        "lora_target_modules": ("peft_config.target_modules", _same),
    },
    "model_kwargs": {"torch_dtype": ("model_kwargs.dtype", _same)},
    "data": {
        "max_seq_length": ("data.max_length", _same),
        "cutoff_len": ("data.max_length", _same),
    },
    "evaluation": {},
}

_HUB = "pushing to the Hub is not part of training"
_FLAT = "flat batches have no padding, so there is nothing to group or pad"
_LAUNCH = "a run is one process on one device"
_NO_TRAINER = "transformers' Trainer is not used"
_LOADER = "rows are tokenised before the run, there is no loader to tune"

# name -> why nothing here answers to it
NO_COUNTERPART: dict[str, dict[str, str]] = {
    "training_config": {
        **dict.fromkeys(
            ["push_to_hub", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "hub_model_id"]
            + ["hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"]
            + ["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"],
            _HUB,
        ),
        **dict.fromkeys(
            ["group_by_length", "length_column_name", "padding_free", "pad_to_multiple_of", "pad_token"]
            + ["packing_strategy", "eval_packing", "num_of_sequences", "chars_per_token", "infinite"],
            _FLAT,
        ),
        **dict.fromkeys(
            ["dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_batch_size"]
            + ["dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"]
            + ["remove_unused_columns", "label_names", "dispatch_batches", "split_batches"]
            + ["accelerator_config", "ignore_data_skip"],
            _LOADER,
        ),
        **dict.fromkeys(
            ["local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend"]
            + ["ddp_timeout", "ddp_static_graph", "fsdp", "fsdp_config", "fsdp_min_num_params", "sharded_ddp"]
            + ["fsdp_transformer_layer_cls_to_wrap", "deepspeed", "parallelism_config", "tp_size", "ray_scope"]
            + ["tpu_num_cores", "tpu_metrics_debug", "mp_parameters", "_n_gpu", "use_mps_device", "xpu_backend"]
            + ["log_level_replica", "log_on_each_node", "save_on_each_node", "average_tokens_across_devices"],
            _LAUNCH,
        ),
        **dict.fromkeys(
            ["do_train", "do_eval", "do_predict", "prediction_loss_only", "eval_accumulation_steps", "eval_delay"]
            + ["eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics", "include_for_metrics"]
            + ["include_inputs_for_metrics", "include_tokens_per_second", "include_num_input_tokens_seen", "debug"]
            + [
                "skip_memory_metrics",
                "use_legacy_prediction_loop",
                "past_index",
                "restore_callback_states_from_checkpoint",
            ]
            + [
                "logging_nan_inf_filter",
                "jit_mode_eval",
                "enable_jit_checkpoint",
                "dataset_kwargs",
                "torch_empty_cache_steps",
            ]
            + ["evaluate_during_training", "save_safetensors", "fp16_full_eval", "bf16_full_eval", "full_determinism"],
            _NO_TRAINER,
        ),
        **dict.fromkeys(
            ["use_ipex", "torchdynamo", "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32"]
            + ["use_liger_kernel", "use_liger", "liger_kernel_config", "fp16_opt_level", "fp16_backend"]
            + ["half_precision_backend"],
            "phinetune has kernels of its own",
        ),
        "bf16": "the base keeps model_kwargs.dtype and LoRA trains in float32: set model_kwargs.dtype",
        "fp16": "float16 needs loss scaling: use model_kwargs.dtype=bfloat16",
        "resume_from_checkpoint": "resume with `phinetune train RECIPE --resume`",
        "use_cache": "set model_kwargs.use_cache",
        "model_init_kwargs": "set model_kwargs",
        "trust_remote_code": "never: native model classes only",
        "save_only_model": "a checkpoint always holds what a resume needs",
        "auto_find_batch_size": "set data.max_batch_tokens: it changes memory, never the update",
        "router_aux_loss_coef": "the loss is plain cross-entropy",
        "dataset_text_field": "set data.format, or data.columns",
        "formatting_func": "the model's own template writes the text: set data.format, or data.columns",
        "chat_template_path": "set tokenizer_kwargs.chat_template",
        "eos_token": "set tokenizer_kwargs.eos_token",
        "truncation_mode": "set data.excess_length_strategy: a row that is too long is listed, not cut, by default",
        "shuffle_dataset": "rows are always shuffled, by data_seed",
        "activation_offloading": "activations stay on the device",
    },
    "peft_config": {
        **dict.fromkeys(
            ["auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"]
            + ["peft_version", "megatron_config", "megatron_core", "fan_in_fan_out"],
            "it is written into adapter_config.json by what was done",
        ),
    },
    "model_kwargs": {
        **dict.fromkeys(["device_map", "low_cpu_mem_usage", "max_memory"], "the model is loaded whole on one device"),
        **dict.fromkeys(
            ["llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"]
            + ["llm_int8_has_fp16_weight"],
            "phinetune's int8 finds outliers and layers that don't bear it by itself",
        ),
        "use_flash_attention_2": "set attn_implementation",
        "trust_remote_code": "never: native model classes only",
    },
    "data": {},
    "evaluation": {},
}

# Names that change what is trained: refused, since ignoring them would train something else than was asked for.
REFUSED: dict[str, dict[str, str]] = {
    "training_config": {
        **dict.fromkeys(["label_smoothing_factor", "loss_type"], "is not supported: the loss is plain cross-entropy"),
        **dict.fromkeys(["optim_args", "optim_target_modules"], "is not supported: the optimiser is AdamW"),
        "neftune_noise_alpha": "is not supported: no noise is added to embeddings",
        "greater_is_better": "is not supported: of eval_loss and perplexity the smaller is better",
        "train_sampling_strategy": "is not supported: rows are shuffled, by data_seed",
        "dataloader_drop_last": "is not supported: the last step of an epoch takes the rows that are left",
    },
    "peft_config": {"peft_type": "is not supported: adapters are LoRA's"}
    | dict.fromkeys(
        ["lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "loftq_config", "eva_config"]
        + ["corda_config", "use_qalora", "qalora_group_size", "alora_invocation_tokens", "arrow_config"]
        + ["lora_ga_config", "velora_config", "monteclora_config", "use_bdlora", "kasa_config"]
        + ["ensure_weight_tying"],
        "is not supported yet",
    ),
    "model_kwargs": {"bnb_4bit_quant_storage": "is not supported: codes are kept in uint8"},
    "evaluation": dict.fromkeys(
        ["num_beams", "num_beam_groups", "penalty_alpha", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"]
        + ["length_penalty", "bad_words_ids", "force_words_ids", "suppress_tokens", "encoder_repetition_penalty"],
        "is not supported: answers are greedy, or drawn by temperature, top_k, top_p and min_p",
    ),
}
# Values of refused names that ask for what happens anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "loss_type": (None, "nll", "chunked_nll"),
    "peft_type": (None, "LORA"),
    "qalora_group_size": (16,),  # what it is without use_qalora
    "train_sampling_strategy": (None, "random", "group_by_length"),
    "bnb_4bit_quant_storage": ("uint8",),
    "num_beams": (1,),
    "typical_p": (1.0,),
    "length_penalty": (1.0,),
}
# What a BitsAndBytesConfig holds that was given nothing; of the 4-bit settings transformers' defaults are kept.
BNB_DEFAULTS: dict[str, Any] = {
    "load_in_8bit": False,
    "load_in_4bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_storage": "uint8",
}
# What a BitsAndBytesConfig of 4 bits has where a mapping like one doesn't name it.
BNB_4BIT_DEFAULTS: dict[str, Any] = {
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
}
QUANTISING = ("load_in_", "bnb_4bit_")  # what `quantization_config` speaks for
_NOTHING_ASKED: tuple[Any, ...] = (None, False, [], {}, "")


def unfold(section: str, given: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config`, a BitsAndBytesConfig or a mapping like one, as the settings that it holds; what stands
    beside it, as an override does, is stronger."""
    config = given.get("quantization_config") if section == "model_kwargs" else None
    config = config.to_dict() if config is not None and hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        return given
    config = (BNB_4BIT_DEFAULTS if config.get("load_in_4bit") else {}) | dict(config)
    plain = BNB_DEFAULTS | {"quant_method": "bitsandbytes"}
    asked = {
        name: value for name, value in config.items() if not name.startswith("_") and plain.get(name, ...) != value
    }
    return {**asked, **{name: value for name, value in given.items() if name != "quantization_config"}}


def settle(section: str, given: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Turns the names given for one section into ours.

    Returns:
        {"section.name": value} under current names, and the words to say about what was mapped or ignored.

    Raises:
        RecipeError: listing every unknown or refused name at once.
    """
    settled: dict[str, Any] = {}
    words: list[str] = []
    faults: list[str] = []
    idle = _idle(section, given)
    for name, value in given.items():
        path = f"{section}.{name}"
        if name in idle:
            continue
        if _is_said_by_the_other(name, given):
            continue
        if name in SECTIONS[section].model_fields or name in MAPPED[section]:
            new_path, value = current_name(section, name, value)
            if settled.get(new_path, value) != value:
                faults.append(f"{new_path} is given twice, as {settled[new_path]!r} and as {name}={value!r}")
            settled[new_path] = value
            if name == "report_to" and value in ("all", ["all"]):
                words.append(f"{path}={value!r} is ignored: name the loggers that you want")
            if new_path != path:
                words.append(f"{path} is read as {new_path}={value}")
        elif name in NO_COUNTERPART[section]:
            words.append(f"{path}={value!r} is ignored: {NO_COUNTERPART[section][name]}")
        elif name in REFUSED.get(section, {}):
            if value not in HARMLESS.get(name, _NOTHING_ASKED):
                faults.append(f"{path}={value!r} {REFUSED[section][name]}")
        else:
            faults.append(f"unknown name {path}{nearest(name, known_names(section))}")
    if faults:
        raise RecipeError(where, " and ".join(faults), "correct or remove it")
    return settled, words


def _idle(section: str, given: dict[str, Any]) -> set[str]:
    """Names that ask for nothing beside another name of the same setting, as every object of an older release has."""
    names: dict[str, list[str]] = {}
    for name, value in given.items():
        owner, _, own = current_name(section, name, value)[0].partition(".")
        if owner == section:
            names.setdefault(own, []).append(name)
    found: set[str] = set()
    for own, alike in names.items():
        idle = [name for name in alike if given[name] in (None, False, 0)]
        if len(alike) > 1:
            found |= {name for name in idle if len(idle) < len(alike) or name != own}
    return found


def _is_said_by_the_other(name: str, given: dict[str, Any]) -> bool:
    """Of TRL's two flags for what is learnt, whether this one adds nothing: not given, or weaker."""
    assistant, completion = given.get("assistant_only_loss"), given.get("completion_only_loss")
    if name == "completion_only_loss":
        return completion is None or bool(assistant) or bool(completion and assistant is False)
    return name == "assistant_only_loss" and (assistant is None or (assistant is False and completion is False))


def current_name(section: str, name: str, value: Any) -> tuple[str, Any]:
    """What a name is called now, `section.name`, and its value there."""
    new_path, convert = MAPPED[section].get(name, (f"{section}.{name}", _same))
    return new_path, convert(value)


def known_names(section: str) -> list[str]:
    """Every name that `settle` doesn't call unknown."""
    tables: list[Iterable[str]] = [SECTIONS[section].model_fields, MAPPED[section], NO_COUNTERPART[section]]
    tables.append(REFUSED.get(section, {}))
    return sorted({name for table in tables for name in table})


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
