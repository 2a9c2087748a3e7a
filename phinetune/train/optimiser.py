"""AdamW on the LoRA parameters, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from phinetune.errors import RecipeError
from phinetune.recipe import TrainingConfig


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization"; torch's own."""
    return torch.optim.AdamW(
        list(trainable_parameters(model).values()),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=config.optim == "adamw_torch_fused",
    )


def learning_rates(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """Step (0, 1, …) -> learning rate, by transformers' own schedules.

    Those are functions of the step alone, so a resumed run needs no scheduler state.

    Raises:
        RecipeError: for a schedule that isn't known, or isn't a function of the step.
    """
    from transformers import get_scheduler

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
