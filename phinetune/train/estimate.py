"""What a run will take, said before it starts: time and memory from the model's sizes and this machine's rate."""

import time
from typing import Any

import torch

from phinetune import lora
from phinetune.kernels import native
from phinetune.kernels.int8 import Int8Weight
from phinetune.kernels.products import product
from phinetune.lora.targets import is_transposed
from phinetune.machine.memory import memory_free, memory_in_use
from phinetune.model.memory import (
    Batch,
    adapted_weights,
    bytes_to_answer,
    bytes_to_come,
    bytes_to_evaluate,
    mapped_bytes,
)

# Share of the machine's matrix-product rate that a whole training step reaches, measured on SmolLM2-135M with flat
# batches of 1,024 tokens on 2 CPU cores: by transformers' layers, and with the C++ kernels of a dtype (docs/log.md).
SHARE_OF_RATE, SHARE_WITH_KERNELS = 0.44, {torch.bfloat16: 0.7, torch.float32: 0.6}
ROOM_TO_FOLD = 1.5  # what must be free beside a second copy of the adapted weights, as a multiple of it


def expected_seconds(model: Any, tokens: int, supervised: int) -> float:
    """For `tokens` trained tokens, `supervised` of which are learnt.

    4 FLOP a weight and token (2 forward, 2 back), over the measured rate.

    The head counts for supervised tokens only, with a third product where it trains whole.  See Hu et al. for why a
    frozen weight has none.
    """
    head = model.get_output_embeddings()
    within = set() if head is None else set(head.modules())  # the original and the copy of one that trains
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) or is_transposed(m)]
    weights = sum(layer.weight.numel() for layer in layers if layer not in within)
    flop: float = 4 * weights * tokens
    if head is not None:
        flop += (6 if head.weight.requires_grad else 4) * head.weight.numel() * supervised
    has_kernels = model.device.type == "cpu" and native.kernels_for(model.dtype)
    return flop / (product_rate(model) * (SHARE_WITH_KERNELS[model.dtype] if has_kernels else SHARE_OF_RATE))


def product_rate(model: Any) -> float:
    """FLOP a second of this machine at one of the model's own products (some 0.2 s)."""
    layers = [layer for _, layer in lora.lora_layers(model) if isinstance(layer, lora.Linear)]
    layer = max(layers or [model.get_output_embeddings()], key=lambda layer: layer.weight.numel())
    weight = layer.weight.T if is_transposed(layer) else layer.weight  # (out, in), however it is stored
    x = torch.ones(512, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            begin = time.perf_counter()
            product(x, weight.T)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return float(2 * x.shape[0] * weight.numel() / min(seconds))


def expected_gb(model: Any, batch: Batch, evaluated: Batch | None = None, answered: int = 0) -> float:
    """Peak memory of a run, in units of 10⁹ bytes, for a model that is loaded and adapted: what is in use now, and what
    the largest of its parts adds.

    Args:
        batch: the largest flat batch that is trained on.
        evaluated: the largest of held-out rows.
        answered: tokens of the most prompts, with their answers, that are answered at once.
    """
    parts = [bytes_to_come(model, batch)]
    if evaluated is not None:
        parts.append(bytes_to_evaluate(model, evaluated))
    if answered:
        parts.append(bytes_to_answer(model, answered, has_room_to_fold(model)))
    return (memory_in_use(model.device) + max(parts)) / 1e9


def has_room_to_fold(model: Any) -> bool:
    """Whether a second copy of the adapted weights, which makes answers faster, fits into what is free. Not where they
    are int8: what is folded is multiplied in 16 bits, and would answer otherwise than it trains."""
    if any(isinstance(parameter, Int8Weight) for parameter in model.parameters()):
        return False
    copy = adapted_weights(model) * torch.finfo(model.dtype).bits / 8
    return copy * ROOM_TO_FOLD < memory_free(model.device) - mapped_bytes(model)
