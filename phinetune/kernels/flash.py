"""Packed attention by a C++ kernel (cpp/attention.cpp): nothing of the size of scores reaches memory.

It is for bfloat16, and with AVX2, where products are in float32 anyway, for float32.
It keeps its input, its output and a number a head and token.  attention.py says what is computed; its plain products
are the reference, and the way of machines and dtypes that this kernel isn't for.

Shape suffixes as in attention.py; A angles, half of what is rotated of a head.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels import native
from phinetune.kernels.packs import NO_WINDOW, Path
from phinetune.kernels.pieces import empty_rows

VECTOR = 16  # a head is so many elements wide, or a multiple
WIDEST = 256


def serves(qkv_TJD: Tensor) -> bool:
    """Whether the kernel computes this."""
    return native.is_plain(qkv_TJD, qkv_TJD.dtype) and is_for(qkv_TJD.shape[2], qkv_TJD.dtype)


def is_for(head_width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is there, and for heads of this width."""
    return head_width % VECTOR == 0 and head_width <= WIDEST and native.library("attention", dtype) is not None


def flash_attention(
    qkv_TJD: Tensor,
    cos_TR: Tensor | None,
    sin_TR: Tensor | None,
    kv_heads: int,
    paths: Sequence[Path],
    scaling: float,
    window: int | None,
) -> Tensor:
    """Attention of queries, keys and values (T, H + 2K, D), the first two rotated where angles are given: (T, H, D)."""
    settings = settings_of(kv_heads, paths, scaling, window)
    return cast(Tensor, _FlashAttention.apply(qkv_TJD.contiguous(), cos_TR, sin_TR, settings))


Settings = tuple[int, tuple[tuple[tuple[int, int], ...], ...], float, int]


def settings_of(kv_heads: int, paths: Sequence[Path], scaling: float, window: int | None) -> Settings:
    """What the kernel is told beside its tensors."""
    return kv_heads, tuple(map(tuple, paths)), scaling, window or NO_WINDOW


def _halves(cos_TR: Tensor | None, sin_TR: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(T, A) each, in fp32: both halves of transformers' cosines and sines are the same.  All layers ask for those of
    the same angles, forward and backward."""
    if cos_TR is None or sin_TR is None:
        return None, None
    if cos_TR.is_inference() or sin_TR.is_inference():
        return _half(cos_TR), _half(sin_TR)
    asked = [(x.data_ptr(), x._version, x.shape, x.stride(), x.dtype) for x in (cos_TR, sin_TR)]
    if getattr(_last, "asked", None) != asked:
        _last.asked, _last.angles = asked, (cos_TR, sin_TR)  # held, so that nothing else lies there
        _last.halves = _half(cos_TR), _half(sin_TR)
    cos_TA, sin_TA = _last.halves
    return cos_TA, sin_TA


def _half(angles_TR: Tensor) -> Tensor:
    return angles_TR[:, : angles_TR.shape[1] // 2].float().contiguous()


_last = threading.local()


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TJD: Tensor, cos_TR: Tensor | None, sin_TR: Tensor | None, settings: Settings) -> Tensor:
        tokens, heads, width = qkv_TJD.shape
        line, _held = line_of(qkv_TJD.data_ptr(), tokens, heads, width, cos_TR, sin_TR, settings)
        out_THD = empty_rows(qkv_TJD, line.tokens, line.heads, line.width)
        lse_HT = qkv_TJD.new_empty(line.heads, line.tokens, dtype=torch.float32)
        _call("attention_forward", line, out_THD, lse_HT)
        ctx.save_for_backward(qkv_TJD, cos_TR, sin_TR, out_THD, lse_HT)  # all layers keep the same angles
        ctx.settings = settings
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TJD, cos_TR, sin_TR, out_THD, lse_HT = ctx.saved_tensors
        dqkv_TJD = empty_rows(qkv_TJD, *qkv_TJD.shape)
        tokens, heads, width = qkv_TJD.shape
        line, _held = line_of(qkv_TJD.data_ptr(), tokens, heads, width, cos_TR, sin_TR, ctx.settings)
        kept = out_THD, lse_HT, dout_THD.contiguous()
        _call("attention_backward", line, *kept, dqkv_TJD)
        return dqkv_TJD, None, None, None


def _call(function: str, line: "_Line", *tensors: Tensor) -> None:
    native.call("attention", function, ctypes.byref(line), *tensors, dtype=tensors[0].dtype)


class _Segment(ctypes.Structure):
    """As in attention.cpp."""

    _fields_ = [(n, ctypes.c_int) for n in ("start", "end", "packed", "position", "tree", "first_piece", "pieces")]


class _Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("packed", "length", "position")]


class _Line(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads", "width", "turned", "threads")),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("segments", "pieces")),
        *((name, ctypes.c_int) for name in ("segment_count", "packed", "trees")),
    ]


class _Layout(NamedTuple):
    """Segments and the pieces of their paths, as the kernel reads them."""

    segments: Any
    pieces: Any
    packed: int
    """Keys in all, each segment's rounded up to whole vectors."""
    trees: int


@functools.lru_cache(maxsize=4)
def _layout(paths: tuple[tuple[tuple[int, int], ...], ...]) -> _Layout:
    packed_at: dict[int, int] = {}
    packed = 0
    for *_, (start, end) in paths:
        packed_at[start] = packed
        packed += -(-(end - start) // VECTOR) * VECTOR
    segments: list[_Segment] = []
    pieces: list[_Piece] = []
    trees: dict[int, int] = {}
    for path in paths:
        first, position = len(pieces), 0
        for start, end in path:
            pieces.append(_Piece(packed_at[start], end - start, position))
            position += end - start
        start, end = path[-1]
        tree = trees.setdefault(path[0][0], len(trees))
        segments.append(_Segment(start, end, packed_at[start], position - (end - start), tree, first, len(path)))
    return _Layout((_Segment * len(segments))(*segments), (_Piece * len(pieces))(*pieces), packed, len(trees))


def line_of(
    qkv: int, tokens: int, heads: int, width: int, cos_TR: Tensor | None, sin_TR: Tensor | None, settings: Settings
) -> tuple[Any, Any]:
    """What the kernel is asked of queries, keys and values at an address, and what must live as long."""
    kv_heads, paths, scaling, window = settings
    cos_TA, sin_TA = _halves(cos_TR, sin_TR)
    layout = _layout(paths)
    line = _Line(
        qkv,
        0 if cos_TA is None else cos_TA.data_ptr(),
        0 if sin_TA is None else sin_TA.data_ptr(),
        tokens,
        heads - 2 * kv_heads,
        kv_heads,
        width,
        0 if cos_TA is None else cos_TA.shape[1],
        torch.get_num_threads(),
        scaling,
        window,
        ctypes.cast(layout.segments, ctypes.c_void_p),
        ctypes.cast(layout.pieces, ctypes.c_void_p),
        len(layout.segments),
        layout.packed,
        layout.trees,
    )
    return line, (cos_TA, sin_TA, layout)
