"""What a step keeps in memory, by the model's sizes, and recomputing decoder layers where that is too much.

    forward   x → [layer] → x → [layer] → x → … → loss       [ ] keeps what its gradients need,
    backward  x ← (layer) ← x ← [layer] ← x ← …              ( ) its input alone, and makes the rest again

The first layers are the ones to recompute: behind them in the backward pass, nothing else is kept any more.
Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from phinetune import lora
from phinetune.kernels import flash, loss, native
from phinetune.kernels.attention import KEPT_KEYS
from phinetune.kernels.bnb import EightBitWeight
from phinetune.kernels.flash import VECTOR
from phinetune.kernels.int8 import Int8Weight
from phinetune.kernels.packs import GROUP_SCORES, LARGEST_BLOCK, SMALLEST_BLOCK
from phinetune.kernels.quantised import QuantisedWeight
from phinetune.layers import blockwise

# Freed memory that lies in pieces too small to be used again, in glibc's heap (docs/log.md): where activations leave
# theirs to the next batch's (kernels/pieces.py), elsewhere, and with int8's codes of activations among them.
SCATTERED, SCATTERED_IN_PLAIN_TORCH, SCATTERED_IN_INT8 = 1.15, 1.3, 1.45


class Batch(NamedTuple):
    """The largest flat batch of a run."""

    tokens: int
    longest: int
    """Tokens of its longest row."""


def kept_by_a_layer(model: Any, batch: Batch) -> int:
    """Bytes that a decoder layer keeps for its gradients, its input among them.

    phinetune's own layers (phinetune.layers, phinetune.kernels.attention) keep both residual streams, q, k and v,
    attention's output, gate and up, the thin products x Aᵀ, and of short rows, where attention is plain products, its
    weights; under dropout a byte for each input of A.
    transformers' eager layers with LoRA layers in them keep about 18 hidden and 4 intermediate widths.
    """
    config = _config(model)
    hidden, intermediate, element = int(config.hidden_size), _intermediate(config), _element(model)
    if not _has_fast_layers(model):
        return (18 * hidden + 4 * intermediate) * element * batch.tokens
    heads, kv_heads, width = _heads(config)
    elements = 2 * hidden + (2 * heads + 2 * kv_heads) * width + 2 * intermediate
    adapters = [a for _, layer in lora.lora_layers(model) for a in layer.adapters.values()]
    ranks: int = sum(block.a.stop - block.a.start for a in adapters for block in a.blocks)
    elements += ranks // len(decoder_layers(model))
    if _is_blockwise(model):
        elements += 4 * VECTOR  # thin products in whole vectors
    if _has_flash(model):
        elements += 2 * heads  # log-sum-exps
    seen = 0 if _has_flash(model) else min(batch.longest, KEPT_KEYS)
    elements += heads * seen * (seen + min(seen, LARGEST_BLOCK)) // 2 // batch.longest
    drops = any(adapter.lora_dropout > 0 for adapter in adapters)
    masks = 2 * hidden + heads * width + intermediate if drops else 0
    return (elements * element + masks) * batch.tokens


def bytes_to_come(model: Any, batch: Batch, recomputed: int | None = None) -> int:
    """What a step adds at its peak to a model that is loaded and adapted, where the first `recomputed` layers are made
    again (by default those that are set so): gradients and two moments of what trains, what the layers keep, and what
    is worked with.
    """
    count = len(decoder_layers(model))
    recomputed = recomputed_layers(model) if recomputed is None else recomputed
    inputs = int(_config(model).hidden_size) * _element(model) * batch.tokens * recomputed
    kept: int = kept_by_a_layer(model, batch) * max(count - recomputed, 1 if recomputed else 0)
    return _trained_with(model) + _scattered(model, inputs + kept + _worked_with(model, batch))


def bytes_to_evaluate(model: Any, batch: Batch) -> int:
    """What the losses of held-out rows add at their peak, beside what steps leave: a layer keeps nothing behind it."""
    return _trained_with(model) + _scattered(model, kept_by_a_layer(model, batch) + _worked_with(model, batch))


def bytes_to_answer(model: Any, tokens: int, folds: bool) -> int:
    """What answers add at their peak, beside what steps leave, for `tokens` of prompts and answers at once: their keys
    and values in all layers, what a layer of transformers' makes of the prompts, and a copy of the adapted weights
    where it `folds`."""
    config, element = _config(model), _element(model)
    _, kv_heads, width = _heads(config)
    cache = 2 * kv_heads * width * len(decoder_layers(model))
    layer = 4 * int(config.hidden_size) + 3 * _intermediate(config)
    copy = adapted_weights(model) if folds else 0
    return _trained_with(model) + ((cache + layer) * tokens + copy) * element


def adapted_weights(model: nn.Module) -> int:
    """How many weights of linear layers have an adapter, and are copied where they are folded."""
    return sum(layer.weight.numel() for _, layer in lora.lora_layers(model) if isinstance(layer, lora.Linear))


def _trained_with(model: Any) -> int:
    """Bytes of gradients and two moments."""
    trained: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 12 * trained


def _scattered(model: Any, size: int) -> int:
    if model.device.type != "cpu":
        return size
    if _has_int8(model):
        return int(size * SCATTERED_IN_INT8)
    return int(size * (SCATTERED if _is_blockwise(model) else SCATTERED_IN_PLAIN_TORCH))


def _worked_with(model: Any, batch: Batch) -> int:
    """What is needed at once beside what is kept: by attention's backward pass, the MLP's, or the head."""
    config, element = _config(model), _element(model)
    hidden, intermediate, on_cpu = int(config.hidden_size), _intermediate(config), bool(model.device.type == "cpu")
    attention = 0
    if _has_fast_layers(model):
        heads, kv_heads, width = _heads(config)
        if not on_cpu:
            attention = 2 * (heads + 2 * kv_heads) * width * batch.tokens * element  # dq, dk, dv, and side by side
        elif _has_flash(model):
            laid_out = 3 * kv_heads * native.element_bytes()  # keys both ways, values
            threads = torch.get_num_threads()
            parts = 2 if kv_heads % threads and kv_heads < 8 * threads else 1  # of a head's queries
            attention = (2 * kv_heads * parts * 4 + laid_out) * width * batch.tokens  # dk, dv
            attention += (heads + 2 * kv_heads) * width * batch.tokens * element
        else:
            queries = min(max(GROUP_SCORES // (heads * batch.longest), SMALLEST_BLOCK), LARGEST_BLOCK, batch.longest)
            keys = batch.tokens * (batch.longest + queries) // (2 * queries)  # of all blocks of queries
            attention = 4 * keys * kv_heads * width * element  # gradients of keys and values, and again side by side
    if _is_blockwise(model):
        heads, kv_heads, width = _heads(config)
        within = hidden + (2 * heads + 2 * kv_heads) * width  # gradients behind attention, of it, and of q, k and v
        laid_out = 3 * hidden * intermediate * native.element_bytes()
        mlp = (2 * hidden + within) * element * batch.tokens + laid_out
    else:
        mlp = (4 * (hidden + intermediate) * batch.tokens + hidden * intermediate * 2 * on_cpu) * element
    vocabulary = int(config.vocab_size)
    a_token = torch.empty(1, hidden, dtype=model.dtype, device=model.device)
    if loss.serves(a_token, a_token):
        logits = loss.CHUNK_TOKENS * (vocabulary * element + hidden * 4 * torch.get_num_threads())
    else:
        table = vocabulary * hidden * element * on_cpu  # oneDNN multiplies by a copy of the weight
        logits = 2 * loss.CHUNK_BYTES + table
    copy = 0 if on_cpu else _copied_for_a_product(model)
    return max(attention, mlp + copy, logits + 5 * hidden * element * batch.tokens)


def _copied_for_a_product(model: Any) -> int:
    """Of weights in few bits the largest as a product reads it on a GPU, and for 8 bits what that is made by: two
    copies in float32 (bitsandbytes 0.50)."""
    weights = [p for p in model.parameters() if isinstance(p, QuantisedWeight)]
    return max((p.numel() * (8 if isinstance(p, EightBitWeight) else 2) for p in weights), default=0)


def layers_to_recompute(model: Any, batch: Batch, free: float) -> int:
    """The fewest decoder layers whose recomputation makes a step fit into `free` bytes; all of them if none does."""
    count = len(decoder_layers(model))
    return next((n for n in range(count) if bytes_to_come(model, batch, n) <= free), count)


def mapped_bytes(model: nn.Module) -> int:
    """Of the parameters, what lies in a mapped file, as safetensors of the model's own dtype do: it isn't counted as
    memory in use, and a step that doesn't find it in memory reads it from the disk."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return 0
    fields = [line.split(maxsplit=5) for line in lines]
    ranges = [tuple(int(end, 16) for end in f[0].split("-")) for f in fields if len(f) == 6 and f[5].startswith("/")]
    own = [p for p in model.parameters() if p.device.type == "cpu"]
    return sum(p.nbytes for p in own if any(begin <= p.data_ptr() < end for begin, end in ranges))


def recompute(model: Any, layers: int) -> None:
    """Makes the first `layers` decoder layers keep their input alone and run again in the backward pass.

    The gradients are the same, on a CPU bit for bit: the same operations, dropout's draws included.
    """
    for number, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = number < layers
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def decoder_layers(model: nn.Module) -> list[Any]:
    """Those that can be recomputed, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recomputed_layers(model: nn.Module) -> int:
    """How many are set to be."""
    return sum(bool(layer.gradient_checkpointing) for layer in decoder_layers(model))


def _has_fast_layers(model: nn.Module) -> bool:
    from phinetune.layers.fast import FastLayer

    return any(isinstance(layer, FastLayer) for layer in decoder_layers(model))


def _has_flash(model: Any) -> bool:
    """Whether attention keeps nothing of the size of scores: our kernel's doesn't, nor does torch's on a GPU."""
    if model.device.type != "cpu":
        return True
    return flash.serves(torch.empty(0, 1, _heads(_config(model))[2], dtype=model.dtype))


def _has_int8(model: Any) -> bool:
    return any(isinstance(parameter, Int8Weight) for parameter in model.parameters())


def _is_blockwise(model: Any) -> bool:
    """Whether the MLP is the C++ kernel's."""
    if not _has_fast_layers(model):
        return False
    weights = [getattr(module, "weight", None) for module in decoder_layers(model)[0].modules()]
    plain = not any(isinstance(weight, QuantisedWeight) for weight in weights)
    config = _config(model)
    elements = 3 * int(config.hidden_size) * _intermediate(config)
    served = model.device.type == "cpu" and model.dtype is torch.bfloat16 and blockwise.holds(elements)
    return plain and served


def _config(model: Any) -> Any:
    """Of its language model, where there are others in it."""
    return model.config.get_text_config()


def _intermediate(config: Any) -> int:
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def _heads(config: Any) -> tuple[int, int, int]:
    """(of queries, of keys and values, their width)"""
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _element(model: Any) -> int:
    return torch.finfo(model.dtype).bits // 8
