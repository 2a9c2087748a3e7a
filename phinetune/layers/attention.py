"""phinetune's packed attention under transformers' public `AttentionInterface`: `attn_implementation="phinetune"`.

A flat batch passes `paths` (phinetune.kernels.attention) through the model's keyword arguments.  Without them
(generation, with a cache or padding) the call goes to transformers' own sdpa.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from phinetune.kernels import Path, packed_attention
from phinetune.layers.projection import computing_dtype

NAME = "phinetune"


def register() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def unread_mask(ids: Tensor) -> Tensor:
    """What goes for a mask where `paths` say who sees whom: transformers would make one of all tokens by all tokens,
    but for one that is made."""
    return ids.new_ones((1, 1, 1, 1), dtype=torch.bool)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    paths: Sequence[Path] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D), as transformers' attention functions."""
    if paths is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    assert query.shape[0] == 1 and paths[-1][-1][1] == key.shape[2], "a flat batch is one line, without a cache"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = computing_dtype(query)
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return packed_attention(q_THD, k_TKD, v_TKD, paths, scaling, sliding_window)[None], None
