"""Packed attention on a GPU: one call of torch's variable-length flash attention for the whole line.

A segment that continues others sees keys that lie elsewhere in the line, so where there are such segments the keys and
values of each path are gathered, one path behind the other.

Shape suffixes as in attention.py; P keys of all paths.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.packs import Path

WIDEST, VECTOR = 256, 8  # of a head, and what its width is a multiple of
FIRST_CAPABILITY = (8, 0)  # Ampere's


def serves(q_THD: Tensor) -> bool:
    """Whether this device computes it so."""
    return (
        q_THD.device.type == "cuda"
        and q_THD.dtype in (torch.bfloat16, torch.float16)
        and q_THD.shape[2] % VECTOR == 0
        and q_THD.shape[2] <= WIDEST
        and torch.cuda.get_device_capability(q_THD.device) >= FIRST_CAPABILITY
    )


def varlen_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, paths: Sequence[Path], scaling: float, window: int | None
) -> Tensor:
    """As attention.packed_attention."""
    from torch.nn.attention.varlen import varlen_attn

    line = _line(tuple(map(tuple, paths)), q_THD.device)
    if line.seen is not None:
        k_TKD, v_TKD = (cast(Tensor, _Gather.apply(x, line.seen)) for x in (k_TKD, v_TKD))
    out_THD = varlen_attn(
        q_THD,
        k_TKD,
        v_TKD,
        line.of_queries,
        line.of_keys,
        line.most_queries,
        line.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return cast(Tensor, out_THD)


class _Line(NamedTuple):
    of_queries: Tensor
    """Where each segment's queries begin, and the end: (segments + 1,)."""
    of_keys: Tensor
    """The same of its path's keys."""
    most_queries: int
    most_keys: int
    seen: Tensor | None
    """The token of each key, (P,); None where each segment sees itself alone."""


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may be asked for again where gradients are
def _line(paths: tuple[tuple[tuple[int, int], ...], ...], device: torch.device) -> _Line:
    """Made once for all layers."""
    queries = [path[-1][1] - path[-1][0] for path in paths]
    keys = [sum(end - start for start, end in path) for path in paths]
    seen = None
    if queries != keys:
        seen = torch.cat([torch.arange(start, end) for path in paths for start, end in path]).to(device)
    bounds = [
        torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (queries, keys)
    ]
    return _Line(bounds[0], bounds[1], max(queries), max(keys), seen)


class _Gather(torch.autograd.Function):
    """Rows of x, some of them several times: their gradients are summed up in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TKD: Tensor, seen_P: Tensor) -> Tensor:
        ctx.save_for_backward(seen_P)
        ctx.tokens = len(x_TKD)
        return x_TKD.index_select(0, seen_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PKD: Tensor) -> tuple[Tensor, None]:
        (seen_P,) = ctx.saved_tensors
        dx_TKD = dy_PKD.new_zeros(ctx.tokens, *dy_PKD.shape[1:], dtype=torch.float32)
        return dx_TKD.index_add_(0, seen_P, dy_PKD.float()).to(dy_PKD.dtype), None
