"""The loss head: cross-entropy over the supervised tokens only, without the logits of the whole batch.

Full logits are T × V floats (1,024 tokens of SmolLM2: 200 MB in fp32), three times over in a plain
backward pass.  Here the head runs over a few hundred supervised tokens at a time, and each chunk's
gradient is made on the spot, in the forward pass, in the place of its logits; only the gradient of the
hidden states is kept.

Shape suffixes: N supervised tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.compiled import compiled
from phinetune.kernels.linear import input_gradient, linear

CHUNK_BYTES = 48 << 20  # of logits: large enough for the product to run at full rate


def linear_cross_entropy_sum(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None = None
) -> Tensor:
    """Σ −w · log softmax(hidden Wᵀ)[target] over N tokens: an fp32 scalar with a gradient for `hidden_ND`.

    Args:
        hidden_ND: (N, D), in half or full precision.
        weight_VD: (V, D), frozen: it gets no gradient.
        targets_N: (N,) token ids.
        weights_N: (N,) how often each counts; once where None.
    """
    if not (torch.is_grad_enabled() and hidden_ND.requires_grad):
        return _sum_over_chunks(hidden_ND, weight_VD, targets_N, weights_N, None)
    return cast(Tensor, _LinearCrossEntropySum.apply(hidden_ND, weight_VD, targets_N, weights_N))


def linear_cross_entropy_sum_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None = None
) -> Tensor:
    """The same in two lines, logits and all."""
    losses_N = F.cross_entropy((hidden_ND @ weight_VD.T).float(), targets_N, reduction="none")
    return (losses_N if weights_N is None else losses_N * weights_N).sum()


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> Tensor:
        dhidden_ND = torch.empty_like(hidden_ND)
        loss = _sum_over_chunks(hidden_ND, weight_VD, targets_N, weights_N, dhidden_ND)
        ctx.save_for_backward(dhidden_ND)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden_ND,) = ctx.saved_tensors
        return dhidden_ND * dloss, None, None, None


def _sum_over_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None, dhidden_ND: Tensor | None
) -> Tensor:
    """The loss; the gradient of `hidden_ND` is written into `dhidden_ND` where one is given."""
    tokens, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    chunk = min(max(1, CHUNK_BYTES // (hidden_ND.element_size() * vocabulary)), tokens)
    buffer_CV = hidden_ND.new_empty(chunk, vocabulary)  # one for all chunks: new memory costs as much as a pass over it
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        targets_C1 = targets_N[rows, None]
        weights_C1 = None if weights_N is None else weights_N[rows, None]
        logits_CV = linear(hidden_ND[rows], weight_VD, out=buffer_CV[: rows.stop - start])
        lse_C1 = _log_sum_exp(logits_CV)
        log_p_C1 = logits_CV.gather(1, targets_C1).to(lse_C1.dtype) - lse_C1
        total -= log_p_C1.sum() if weights_C1 is None else (log_p_C1 * weights_C1).sum()
        if dhidden_ND is not None:
            times_C1 = torch.ones_like(lse_C1) if weights_C1 is None else weights_C1.to(lse_C1.dtype)
            _softmax_(logits_CV, lse_C1, times_C1)
            at_targets_C = (torch.expm1(log_p_C1) * times_C1)[:, 0].to(logits_CV.dtype)  # p − 1, not rounded before
            logits_CV[torch.arange(len(logits_CV), device=logits_CV.device), targets_C1[:, 0]] = at_targets_C
            dhidden_ND[rows] = input_gradient(logits_CV, weight_VD)
    return total


@compiled
def _log_sum_exp(logits_CV: Tensor) -> Tensor:
    """(C, 1), in fp32 at least. torch's own CPU logsumexp is off by 1e-5 over 49,152 fp32 logits (torch 2.13)."""
    precise_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    top_C1 = precise_CV.amax(-1, keepdim=True)
    return top_C1 + (precise_CV - top_C1).exp().sum(-1, keepdim=True).log()


@compiled
def _softmax_(logits_CV: Tensor, lse_C1: Tensor, times_C1: Tensor) -> None:
    """times · softmax in place, by the log-sum-exp."""
    logits_CV.copy_((logits_CV.to(lse_C1.dtype) - lse_C1).exp() * times_C1)
