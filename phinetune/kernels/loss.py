"""The loss head: cross-entropy over the supervised tokens only, without the logits of the whole batch.

Full logits are T × V floats (1,024 tokens of SmolLM2: 200 MB in fp32), three times over in a plain
backward pass.  Here the head runs over a few hundred supervised tokens at a time, and each chunk's
gradient is made on the spot, in the forward pass; only the gradient of the hidden states is kept.

Shape suffixes: N supervised tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels import native
from phinetune.kernels.compiled import compiled
from phinetune.kernels.linear import input_gradient, linear

PANEL = 64  # words that the C++ head computes at a time
CHUNK_BYTES = 48 << 20  # of logits: large enough for the product to run at full rate
CHUNK_TOKENS = 288  # of the C++ head, which lays the weight out for each chunk, as long as products of 20 tokens take


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


@torch.no_grad()
def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """−log softmax(hidden Wᵀ)[target] of each of N tokens: (N,) in fp32, without a gradient."""
    once_N = torch.ones(len(hidden_ND), device=hidden_ND.device, dtype=torch.float32)
    log_p = [log_p_C for log_p_C, _ in _chunks(hidden_ND, weight_VD, targets_N, once_N, None)]
    return -torch.cat(log_p).float() if log_p else once_N


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
    times_N = hidden_ND.new_ones(len(hidden_ND)) if weights_N is None else weights_N
    times_N = times_N.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for log_p_C, times_C in _chunks(hidden_ND, weight_VD, targets_N, times_N, dhidden_ND):
        total -= (log_p_C * times_C).sum()
    return total


def _chunks(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, times_N: Tensor, dhidden_ND: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(log p of the targets, how often each counts) of as many tokens at a time as have room; gradients are written."""
    tokens, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    if serves(hidden_ND, weight_VD):
        chunk_of, most = _native_chunk, CHUNK_TOKENS
    else:
        chunk_of, most = _chunk, max(1, CHUNK_BYTES // (hidden_ND.element_size() * vocabulary))
    logits = _workspace(most * (vocabulary + PANEL), hidden_ND)
    for start in range(0, tokens, most):
        rows = slice(start, min(start + most, tokens))
        dhidden_CD = None if dhidden_ND is None else dhidden_ND[rows]
        log_p_C = chunk_of(hidden_ND[rows], weight_VD, targets_N[rows], times_N[rows], logits, dhidden_CD)
        yield log_p_C, times_N[rows]


def _chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    times_C: Tensor,
    logits: Tensor,
    dhidden_CD: Tensor | None,
) -> Tensor:
    """log p of the targets, (C,); the hidden states' gradients are written. `logits` is working memory for C × V."""
    logits_CV = logits[: len(hidden_CD) * len(weight_VD)].view(len(hidden_CD), -1)
    linear(hidden_CD, weight_VD, out=logits_CV)
    lse_C1 = _log_sum_exp(logits_CV)
    log_p_C = logits_CV.gather(1, targets_C[:, None])[:, 0].to(lse_C1.dtype) - lse_C1[:, 0]
    if dhidden_CD is not None:
        _softmax_(logits_CV, lse_C1, times_C[:, None])
        at_target_C = torch.expm1(log_p_C) * times_C  # p − 1, not rounded before
        logits_CV[torch.arange(len(logits_CV), device=logits_CV.device), targets_C] = at_target_C.to(logits_CV.dtype)
        dhidden_CD.copy_(input_gradient(logits_CV, weight_VD))
    return log_p_C


def _native_chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    times_C: Tensor,
    logits: Tensor,
    dhidden_CD: Tensor | None,
) -> Tensor:
    """The same in C++, without a copy of the weight."""
    sizes = *hidden_CD.shape, len(weight_VD), torch.get_num_threads()
    lse_C, log_p_C = hidden_CD.new_empty(2, len(hidden_CD), dtype=torch.float32).unbind()
    targets_C = targets_C.long().contiguous()
    if targets_C.min() < 0 or targets_C.max() >= len(weight_VD):
        least, most = int(targets_C.min()), int(targets_C.max())
        raise IndexError(f"targets are words from 0 to {len(weight_VD) - 1}, and there are some from {least} to {most}")
    native.call("loss", "head_forward", *sizes, hidden_CD, weight_VD, targets_C, logits, lse_C, log_p_C)
    if dhidden_CD is not None:
        at_target_C = torch.expm1(log_p_C) * times_C
        gradients = logits, weight_VD, lse_C, times_C.contiguous(), targets_C, at_target_C, dhidden_CD
        native.call("loss", "head_backward", *sizes, *gradients)
    return log_p_C


def serves(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether cpp/loss.cpp is for these."""
    plain = all(native.is_plain(t, torch.bfloat16) and t.is_contiguous() for t in (hidden_ND, weight_VD))
    whole = hidden_ND.shape[1] % 16 == 0 and len(hidden_ND) > 0
    return plain and whole and native.library("loss") is not None


_held = threading.local()  # what a thread computes in isn't another's


def _workspace(elements: int, like: Tensor) -> Tensor:
    """Working memory in the dtype of `like`. On a CPU it is one lasting piece a thread: pieces that come and go
    leave holes in the heap that nothing else of their size fills."""
    if like.device.type != "cpu":
        return like.new_empty(elements)
    need = elements * like.element_size()
    held: Tensor | None = getattr(_held, "bytes", None)
    if held is None or held.numel() < need:
        with torch.inference_mode(False):  # it may be written to outside of it, later
            held = _held.bytes = torch.empty(need, dtype=torch.uint8, device="cpu")
    return held[:need].view(like.dtype)


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
