"""RMSNorm (Zhang & Sennrich, 2019) and its gradient, each one pass.

    rstd = 1 / √(mean(x²) + eps)        y = w · (x · rstd)        statistics in fp32, as transformers' layers have them

Shape suffixes: T tokens, D hidden width.
"""

import torch
from torch import Tensor

from phinetune.kernels.compiled import compiled


@compiled
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (T, D) -> its norm (T, D) in x's dtype, and rstd (T, 1) in fp32."""
    precise_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    rstd_T1 = torch.rsqrt(precise_TD.square().mean(-1, keepdim=True) + eps)
    return weight_D * (precise_TD * rstd_T1).to(x_TD.dtype), rstd_T1


@compiled
def rms_norm_again(x_TD: Tensor, weight_D: Tensor, rstd_T1: Tensor) -> Tensor:
    """The norm with rstd known: what a backward pass makes again in place of keeping it."""
    return weight_D * (x_TD.to(rstd_T1.dtype) * rstd_T1).to(x_TD.dtype)


@compiled
def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T1: Tensor) -> Tensor:
    """The gradient of x, (T, D): rstd · (w·dy − x̂ · mean(w·dy · x̂)), where x̂ = x · rstd. The weight is frozen."""
    normed_TD = x_TD.to(rstd_T1.dtype) * rstd_T1
    scaled_TD = dy_TD.to(rstd_T1.dtype) * weight_D.to(rstd_T1.dtype)
    along_T1 = (scaled_TD * normed_TD).mean(-1, keepdim=True)
    return (rstd_T1 * (scaled_TD - normed_TD * along_T1)).to(dy_TD.dtype)
