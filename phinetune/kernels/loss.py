"""The loss head: cross-entropy over the supervised tokens only, without the logits of the whole batch.

Full logits are T × V floats (1,024 tokens of SmolLM2: 200 MB in fp32), three times over in a plain
backward pass.  Here the head runs over a few hundred supervised tokens at a time, and each chunk's
gradient is made on the spot, in the forward pass; only the gradient of the hidden states is kept.

Shape suffixes: N supervised tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.products import product

CHUNK_BYTES = 64 << 20  # of fp32 logits: large enough for the product to run at full rate


def linear_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ −log softmax(hidden Wᵀ)[target] over N tokens: an fp32 scalar with a gradient for `hidden_ND`.

    `weight_VD` (V, D) must be frozen: it gets no gradient.
    """
    if not (torch.is_grad_enabled() and hidden_ND.requires_grad):
        return _sum_over_chunks(hidden_ND, weight_VD, targets_N, None)
    return cast(Tensor, _LinearCrossEntropySum.apply(hidden_ND, weight_VD, targets_N))


def linear_cross_entropy_sum_reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The same in one line, logits and all."""
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), targets_N, reduction="sum")


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        dhidden_ND = torch.empty_like(hidden_ND)
        loss = _sum_over_chunks(hidden_ND, weight_VD, targets_N, dhidden_ND)
        ctx.save_for_backward(dhidden_ND)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden_ND,) = ctx.saved_tensors
        return dhidden_ND * dloss, None, None


def _sum_over_chunks(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dhidden_ND: Tensor | None) -> Tensor:
    """The loss; the gradient of `hidden_ND` is written into `dhidden_ND` where one is given."""
    chunk = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        targets_C1 = targets_N[rows, None]
        # log_softmax, not logsumexp: torch's CPU logsumexp is off by 1e-5 over 49,152 fp32 logits (torch 2.13).
        log_p_CV = product(hidden_ND[rows], weight_VD.T).log_softmax(-1, dtype=torch.float32)
        log_p_C1 = log_p_CV.gather(1, targets_C1)
        total -= log_p_C1.sum()
        if dhidden_ND is not None:
            dlogits_CV = log_p_CV.exp_()  # softmax minus one-hot, in place
            dlogits_CV.scatter_add_(1, targets_C1, torch.full_like(log_p_C1, -1.0))
            dhidden_ND[rows] = product(dlogits_CV.to(weight_VD.dtype), weight_VD)
    return total
