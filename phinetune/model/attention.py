"""phinetune's packed attention under transformers' public `AttentionInterface`: `attn_implementation="phinetune"`.

A flat batch passes `bounds=[0, …, T]` through the model's keyword arguments.  Without them (generation, with
a cache or padding) the call goes to transformers' own sdpa, and so does the mask: a model that would lose the
bounds on the way still gets a right answer.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from phinetune.kernels import packed_attention

NAME = "phinetune"


def register() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    bounds: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D), as transformers' attention functions."""
    if bounds is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    assert query.shape[0] == 1 and bounds[-1] == key.shape[2], "a flat batch is one line, without a cache"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_HTD = packed_attention(query[0], key[0], value[0], bounds, scaling, sliding_window)
    return out_HTD.transpose(0, 1)[None], None
