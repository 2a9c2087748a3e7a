"""What the C++ kernels of decoder layers are asked: a projection as they read it (kernels/cpp/projection.h)."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phinetune.kernels import native
from phinetune.kernels.pieces import empty_rows
from phinetune.lora.functional import Projection, draw_dropout

VECTOR = 16  # widths are multiples of it


def call(function: str, parts: Sequence["Asked"], keeps: Sequence[Tensor | None], tokens: int, *more: Any) -> None:
    """The kernel's function on parts and what dropout keeps of their inputs, on so many tokens, and on tensors (null
    where None) or addresses."""
    for part, keep_TK in zip(parts, keeps, strict=True):
        part.struct.keep = None if keep_TK is None else keep_TK.data_ptr()
    asked = [ctypes.byref(part.struct) for part in parts]
    native.call("decoder", function, *asked, tokens, torch.get_num_threads(), *more)


class _LowRank(ctypes.Structure):
    """As in projection.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("out", "columns", "a", "rank")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "dA", "dB")),
        ("scaling", ctypes.c_float),
    ]


class _Projection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "ranks", "block_count")),
        ("keep_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weights", "rows", "bias", "blocks", "keep")),
    ]


class Asked:
    """A projection as the kernel reads it, with the tensors that it points at: they stay, whatever a module gets."""

    def __init__(self, part: Projection) -> None:
        self.part = part
        self.weights = [weight.detach() for weight in part.weights]
        self.factors = [factor.detach().float().contiguous() for factor in part.trained]
        self.bias = _bias_of(part)
        rows = [len(weight) for weight in self.weights]
        self.inputs, self.outputs = self.weights[0].shape[1], sum(rows)
        self.ranks, low_rank = 0, []
        for (*_, blocks), lora_A, lora_B in zip(part.updates, self.factors[::2], self.factors[1::2], strict=True):
            for out, a, b, scaling in blocks:
                sizes = out.start, out.stop - out.start, self.ranks + a.start, a.stop - a.start
                A, B = lora_A.data_ptr() + 4 * self.inputs * a.start, lora_B.data_ptr() + 4 * (b.start or 0)
                low_rank.append(_LowRank(*sizes, A, B, None, None, scaling))
            self.ranks += len(lora_A)
        self.padded = -(-self.ranks // VECTOR) * VECTOR
        self.arrays = (
            (ctypes.c_void_p * len(rows))(*(weight.data_ptr() for weight in self.weights)),
            (ctypes.c_int * len(rows))(*rows),
            (_LowRank * len(low_rank))(*low_rank),
        )
        weights_at, rows_at, low_rank_at = [ctypes.addressof(array) for array in self.arrays]
        bias_at = None if self.bias is None else self.bias.data_ptr()
        keep_scale = 1 / max(1 - part.dropout_p, 1e-12)
        self.struct = _Projection(
            self.inputs, self.outputs, self.ranks, len(low_rank), keep_scale, weights_at, rows_at, bias_at, low_rank_at
        )

    def draw(self, like: Tensor) -> Tensor | None:
        """A dropout mask for what A reads of as many tokens as `like` has rows, (T, K)."""
        if not self.part.updates:
            return None
        return draw_dropout(like.new_empty(1, 1).expand(len(like), self.inputs), self.part.dropout_p)

    def new_thin(self, x_TK: Tensor) -> Tensor | None:
        return empty_rows(x_TK, len(x_TK), self.padded) if self.ranks else None

    def new_gradients(self) -> list[Tensor]:
        """Of A and B of each update, in fp32, where the kernel writes them next."""
        gradients = [torch.zeros_like(factor) for factor in self.factors]
        low_rank = iter(self.arrays[2])
        for (*_, blocks), dA, dB in zip(self.part.updates, gradients[::2], gradients[1::2], strict=True):
            for (_, a, b, _), block in zip(blocks, low_rank, strict=False):  # which goes on
                block.dA = dA.data_ptr() + 4 * dA.shape[1] * a.start
                block.dB = dB.data_ptr() + 4 * (b.start or 0)
        return gradients

    def as_trained(self, gradients: list[Tensor]) -> list[Tensor]:
        """In the dtypes of A and B."""
        return [d.to(factor.dtype) for d, factor in zip(gradients, self.part.trained, strict=True)]


def _bias_of(part: Projection) -> Tensor | None:
    """(N,) in fp32."""
    if all(bias is None for bias in part.biases):
        return None
    pairs = zip(part.biases, part.weights, strict=True)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias.detach() for bias, w in pairs]).float()
