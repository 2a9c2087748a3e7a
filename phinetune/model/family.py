"""What phinetune knows of a model's family: how it takes a batch, where its loss is computed, what it fuses."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.data import Example, FlatBatch, flatten, lay_out
from phinetune.kernels import linear_cross_entropy, linear_cross_entropy_sum
from phinetune.layers.attention import NAME as PACKED
from phinetune.layers.attention import unread_mask

# Families whose attention is plain causal (perhaps with a window) and whose head is one product: tests compare
# flat batches with rows run one by one.  Any other causal LM gets a row at a time, and its own head.
FLAT_FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})


def takes_flat_batches(model: Any) -> bool:
    """Whether several rows may lie in one line; packed attention has no dropout of its own."""
    config = model.config
    plain = config.model_type in FLAT_FAMILIES and not getattr(config, "attention_dropout", 0)
    return plain and config._attn_implementation == PACKED


def long_rope_boundary(config: Any) -> int | None:
    """The row length on whose two sides LongRoPE uses other factors; None without LongRoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def flat_batches(model: Any, examples: Sequence[Example], max_tokens: int) -> list[FlatBatch]:
    """The rows in flat batches as the model can take them: a row each where it can't take several, or where angles go
    by the longest (dynamic RoPE)."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if not takes_flat_batches(model) or rope.get("rope_type") == "dynamic":
        return [flatten([example], rows=[row]) for row, example in enumerate(examples)]
    return lay_out(examples, max_tokens, long_rope_boundary(model.config))


def loss_sum(model: Any, batch: FlatBatch) -> Tensor:
    """Σ cross-entropy over the batch's supervised tokens: an fp32 scalar."""
    x, weight = _before_head(model, batch)
    if weight is not None:
        return linear_cross_entropy_sum(x, weight, batch.targets, batch.counts)
    losses_N = F.cross_entropy(x.float(), batch.targets, reduction="none")
    return (losses_N if batch.counts is None else losses_N * batch.counts).sum()


@torch.no_grad()
def row_losses(model: Any, batch: FlatBatch) -> list[float]:
    """The same of each of `batch.rows`, without a gradient."""
    x, weight = _before_head(model, batch)
    if weight is not None:
        losses_N = linear_cross_entropy(x, weight, batch.targets)
    else:
        losses_N = F.cross_entropy(x.float(), batch.targets, reduction="none")
    losses = losses_N.double().cpu().numpy()
    return [float(losses[learnt].sum()) for learnt in batch.learnt]


def _before_head(model: Any, batch: FlatBatch) -> tuple[Tensor, Tensor | None]:
    """(N, D) of the places that predict, and the head's weight; where the head is more than a product, logits alone."""
    if not takes_flat_batches(model):
        return model(input_ids=batch.ids, use_cache=False, logits_to_keep=batch.predict).logits[0], None
    hidden_TD = model.model(
        input_ids=batch.ids,
        attention_mask=unread_mask(batch.ids),
        position_ids=batch.position_ids,
        use_cache=False,
        paths=batch.paths,
    ).last_hidden_state[0]
    head, hidden_ND = model.lm_head, hidden_TD.index_select(0, batch.predict)
    if type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad:
        return hidden_ND, head.weight
    return head(hidden_ND), None


def fused_parts(config: Any) -> dict[str, dict[str, int]]:
    """{fused layer: {part: rows}} of a model, from its config; empty where nothing is fused.

    Phi-3 (`model_type: phi3`, which Phi-3.5, Phi-4 and Phi-4-mini share): `qkv_proj` rows are
    [heads·d | kv·d | kv·d], `gate_up_proj` rows are [intermediate | intermediate], gate first
    (transformers, modeling_phi3.py).
    """
    if config.model_type != "phi3":
        return {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q_rows, kv_rows = config.num_attention_heads * width, config.num_key_value_heads * width
    return {
        "qkv_proj": {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }


def has_position_table(model: Any) -> bool:
    """Whether positions are learnt, in a table that ends (GPT-2, OPT)."""
    positions, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    # OPT's has two more.
    return positions is not None and any(positions <= table.num_embeddings <= positions + 2 for table in tables)
