"""LoRA on a loaded model, by the names of the recipe."""

import logging
from typing import Any

import torch

from phinetune import lora
from phinetune.errors import RecipeError
from phinetune.model.family import fused_parts
from phinetune.recipe import PeftConfig

log = logging.getLogger(__name__)


def adapt_model(model: Any, config: PeftConfig, seed: int) -> list[str]:
    """Puts LoRA layers in, freshly drawn from `seed`; what trains does so in fp32. Returns the layers' names.

    Raises:
        RecipeError: if a target matches nothing (the message lists what the model has) or can't be adapted as asked.
    """
    if config.bias == "all" and model.dtype != torch.float32:
        log.warning(f"bias: all: biases outside adapted layers train in {model.dtype}, which rounds small steps away")
    torch.manual_seed(seed)
    try:
        names = lora.adapt(
            model,
            config.target_modules,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            use_dora=config.use_dora,
            init_lora_weights=config.init_lora_weights,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            modules_to_save=config.modules_to_save,
            bias=config.bias,
            fused=fused_parts(model.config),
            dtype=torch.float32,
        )
    except ValueError as error:
        raise RecipeError("peft_config", str(error), "correct peft_config") from None
    return names
