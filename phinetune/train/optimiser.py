"""AdamW on what trains, and the learning rate as a function of the step."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from phinetune.errors import RecipeError
from phinetune.lora.biases import is_bias
from phinetune.recipe import PeftConfig, TrainingConfig

log = logging.getLogger(__name__)

# What transformers calls bitsandbytes' optimisers, and what these are called there.
BITSANDBYTES = {
    "adamw_bnb_8bit": "AdamW8bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, config: TrainingConfig, peft_config: PeftConfig) -> torch.optim.Optimizer:
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization": torch's own, or bitsandbytes' in fewer bits.

    Raises:
        RecipeError: for bitsandbytes' where it isn't installed.
    """
    groups = parameter_groups(model, config, peft_config)
    betas = config.adam_beta1, config.adam_beta2
    if config.optim not in BITSANDBYTES:
        fused = config.optim == "adamw_torch_fused"
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=fused)
    try:
        import bitsandbytes
    except ImportError:
        where, what = f"training_config.optim={config.optim}", "bitsandbytes is not installed"
        raise RecipeError(where, what, "pip install 'phinetune[qlora]', or use adamw_torch") from None
    name = BITSANDBYTES[config.optim]
    if all(parameter.device.type == "cpu" for parameter in trainable_parameters(model).values()):
        name = name.removeprefix("Paged")  # there is nowhere to page to
    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon
    )
    return made


def parameter_groups(model: nn.Module, config: TrainingConfig, peft_config: PeftConfig) -> list[dict[str, Any]]:
    """What trains, by `lr_factor` (of the scheduled learning rate) and weight decay, which biases and norms don't have.

    LoRA+ (Hayou et al., 2024): B, DoRA's magnitudes and biases learn `loraplus_lr_ratio` times as fast as A, and
    embeddings' matrices at `loraplus_lr_embedding`.
    """
    ratio = peft_config.loraplus_lr_ratio
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable_parameters(model).items():
        owner, _, own = name.rpartition(".")
        if ratio is None:
            lr_factor = 1.0
        elif own.startswith(("lora_A", "lora_B")) and isinstance(model.get_submodule(owner), nn.Embedding):
            lr_factor = peft_config.loraplus_lr_embedding / config.learning_rate
        else:
            lr_factor = ratio if own.startswith("lora_B") or parameter.ndim == 1 else 1.0
        is_norm = "norm" in type(model.get_submodule(owner)).__name__.lower()
        weight_decay = 0.0 if is_bias(own) or is_norm else config.weight_decay
        groups.setdefault((lr_factor, weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": lr_factor, "weight_decay": weight_decay}
        for (lr_factor, weight_decay), parameters in groups.items()
    ]


def learning_rates(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """Step (0, 1, …) -> learning rate, by transformers' own schedules.

    Those are functions of the step alone, so a resumed run needs no scheduler state.

    Raises:
        RecipeError: for a schedule that isn't known, or isn't a function of the step.
    """
    from transformers import get_scheduler

    if config.lr_scheduler_type == "constant" and (config.warmup_steps > 0 or config.lr_scheduler_kwargs):
        log.warning("lr_scheduler_type constant has no warmup and no lr_scheduler_kwargs: constant_with_warmup has")
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)  # some schedules look at it
    try:
        scheduler: Any = get_scheduler(
            config.lr_scheduler_type,
            dummy,
            num_warmup_steps=warmup_steps(config, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
        factor = scheduler.lr_lambdas[0]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        name = config.lr_scheduler_type
        raise RecipeError(
            f"training_config.lr_scheduler_type={name!r}",
            f"is not a schedule that can be used ({' '.join(str(error).split())})",
            "use linear, cosine, constant or constant_with_warmup",
        ) from None
    return lambda step: config.learning_rate * float(factor(step))


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    return interval(config.warmup_steps, total_steps) if config.warmup_steps > 0 else 0


def interval(value: float, total_steps: int) -> int:
    """A number of steps as TrainingArguments writes it: below 1 it is a share of all steps."""
    return max(1, math.ceil(value * total_steps) if value < 1 else int(value))
