"""Rotary position embedding (Su et al., 2021) in the layout of transformers' models: halves, not pairs.

    (a, b) -> (a cos − b sin, b cos + a sin)       a, b the two halves of the rotated part of a head

Shape suffixes: T tokens, H heads, D head width, R rotated part of it (R < D in Phi-4-mini).
"""

import torch
from torch import Tensor

from phinetune.kernels.compiled import compiled


@compiled
def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int) -> Tensor:
    """x (T, H, D) with its first `heads` heads turned by their positions' angles, in x's dtype; sums in fp32."""
    return torch.cat([_turned(x_THD[:, :heads], cos_TR, sin_TR), x_THD[:, heads:]], 1)


def rotate_backward(dy_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int) -> Tensor:
    """The gradient of x: a rotation's transpose turns the other way (its scale, LongRoPE's, stays)."""
    return rotate(dy_THD, cos_TR, -sin_TR, heads)


@compiled
def rotate_backward_side_by_side(
    dq_THD: Tensor, dk_TKD: Tensor, dv_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor
) -> Tensor:
    """The same of q and k that were turned and of v that wasn't, as one: (T, H + 2K, D)."""
    return torch.cat([_turned(dq_THD, cos_TR, -sin_TR), _turned(dk_TKD, cos_TR, -sin_TR), dv_TKD], 1)


def _turned(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    half = cos_TR.shape[-1] // 2
    precise = torch.promote_types(x_THD.dtype, torch.float32)
    cos, sin = cos_TR[:, None, :half].to(precise), sin_TR[:, None, :half].to(precise)
    a, b = x_THD[..., :half].to(precise), x_THD[..., half : 2 * half].to(precise)
    turned = [(a * cos - b * sin).to(x_THD.dtype), (b * cos + a * sin).to(x_THD.dtype)]
    return torch.cat([*turned, x_THD[..., 2 * half :]], -1)
