"""Causal attention over a flat pack: several examples end to end in one row, none seeing another.

    tokens   a a a b b        a [ 1 . . . . ]     bounds [0, 3, 5]
                              a [ 1 1 . . . ]
                              a [ 1 1 1 . . ]
                              b [ . . . 1 . ]
                              b [ . . . 1 1 ]

The square is never built: each example gets its own call.  Shape suffixes: H query heads, K key-value
heads, G query heads a key-value head (H = K·G), T tokens, L tokens of one example, D head width.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's CPU flash attention costs about three times the plain products at 180 tokens, forward and
# backward, and wins from about 256 (D=96) to 512 (D=64) on (benchmarked on AMD Zen 4, torch 2.13).
SHORT = 256


def packed_attention(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    bounds: list[int],
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """Softmax(scaling · q kᵀ) v within each example, causal.

    Args:
        q_HTD: queries (H, T, D); k_KTD, v_KTD: keys and values (K, T, D), K dividing H.
        bounds: where examples begin and end, [0, …, T].
        scaling: the factor on the scores, as a rule D ** -0.5.
        window: a token sees itself and the `window - 1` tokens before it; all of them where None.

    Returns:
        (H, T, D).
    """
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    # One split each, so that the backward pass is one concatenation, not a zero-filled pack an example.
    examples = zip(q_HTD.split(lengths, 1), k_KTD.split(lengths, 1), v_KTD.split(lengths, 1), strict=True)
    outs = [_one_example(q, k, v, scaling, window) for q, k, v in examples]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _one_example(q_HLD: Tensor, k_KLD: Tensor, v_KLD: Tensor, scaling: float, window: int | None) -> Tensor:
    length = q_HLD.shape[1]
    banded = window is not None and length > window
    if q_HLD.device.type == "cpu" and length <= SHORT and not banded:
        return _plain_products(q_HLD, k_KLD, v_KLD, scaling)
    mask = _band_LL(length, window, q_HLD.device) if banded and window is not None else None
    return F.scaled_dot_product_attention(
        q_HLD[None], k_KLD[None], v_KLD[None], mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )[0]


def _plain_products(q_HLD: Tensor, k_KLD: Tensor, v_KLD: Tensor, scaling: float) -> Tensor:
    """Two batched products and a softmax in fp32; grouped queries share their keys without a copy."""
    heads, length, width = q_HLD.shape
    kv_heads = k_KLD.shape[0]
    q_KGLD = (q_HLD * scaling).reshape(kv_heads, -1, width)  # (K, G·L, D)
    scores_KGLL = (q_KGLD @ k_KLD.transpose(1, 2)).view(kv_heads, -1, length, length)
    future_LL = torch.ones(length, length, dtype=torch.bool, device=q_HLD.device).triu_(1)
    weights_KGLL = scores_KGLL.masked_fill(future_LL, float("-inf")).softmax(-1, dtype=torch.float32).to(q_HLD.dtype)
    return (weights_KGLL.view(kv_heads, -1, length) @ v_KLD).view(heads, length, width)


def _band_LL(length: int, window: int, device: torch.device) -> Tensor:
    """True where query i sees key j: i - window < j <= i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
