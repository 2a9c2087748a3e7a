"""A decoder layer in bfloat16 as one autograd function over the C++ kernels of its parts.

decoder.py has the parts, each an autograd function of its own (blockwise.py, kernels/flash.py), for layers of which the
kernels compute some.  Beside the kernels of a small model, what Python and torch do for each function and each tensor
is a twentieth of a step; here they do it once a layer, whose activations lie in one piece of memory.

Shape suffixes as in decoder.py; H heads.
"""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels import Path, flash, native
from phinetune.kernels.pieces import empty_rows
from phinetune.layers.asked import call
from phinetune.layers.ready import Ready

ALIGNED = 64  # bytes


def decoder_layer(x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, paths: Sequence[Path], layer: Ready) -> Tensor:
    """(T, D) -> (T, D), as the parts one behind the other."""
    kv_heads, scaling, window, _ = layer.attention
    settings = flash.settings_of(kv_heads, paths, scaling, window)
    return cast(Tensor, _Layer.apply(layer, settings, x_TD, cos_TR, sin_TR, *layer.trained))


class _Kept(NamedTuple):
    """Where what a layer keeps for its gradients lies, beside its input."""

    rstd_T: Any
    rstd_mlp_T: Any
    lse_HT: Any
    qkv_TN: Any
    attended_TN: Any
    middle_TD: Any  # behind attention
    gate_up_T2F: Any
    thin_qkv: Any
    thin_o: Any
    thin_gate_up: Any
    thin_down: Any


def _piece(like: Tensor, tokens: int, sizes: Sequence[int]) -> Tensor:
    """Memory for several tensors of `sizes` bytes a token."""
    row = sum(sizes)
    return empty_rows(like, -(-_ends(tokens, sizes)[-1] // row), row, dtype=torch.uint8)


def _carve(piece: Tensor, tokens: int, sizes: Sequence[int]) -> list[Any]:
    """Where each of them begins: in the piece as it is given, which may be another than was kept (a checkpoint makes it
    again)."""
    return [ctypes.c_void_p(piece.data_ptr() + at) for at in (0, *_ends(tokens, sizes)[:-1])]


def _ends(tokens: int, sizes: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(-(-tokens * size // ALIGNED) * ALIGNED for size in sizes))


def _attend(
    function: str, layer: Ready, settings: flash.Settings, angles: tuple[Tensor, Tensor], kept: _Kept, tokens: int,
    *more: Any,
) -> None:  # fmt: skip
    width = layer.attention.head_width
    line, _held = flash.line_of(kept.qkv_TN.value, tokens, layer.asked[0].outputs // width, width, *angles, settings)
    native.call("attention", function, ctypes.byref(line), kept.attended_TN, kept.lse_HT, *more)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Ready,
        settings: flash.Settings,
        x_TD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        x_TD, tokens = x_TD.contiguous(), len(x_TD)
        (norm, eps), (norm_mlp, eps_mlp) = layer.norms
        qkv, o, gate_up, down = layer.asked
        y_TD, piece = empty_rows(x_TD, *x_TD.shape), _piece(x_TD, tokens, layer.kept_bytes)
        kept = _Kept(*_carve(piece, tokens, layer.kept_bytes))
        keep, keep_o, *keeps_mlp = keeps = [part.draw(x_TD) for part in layer.asked]

        of_qkv = x_TD, norm, ctypes.c_float(eps), None
        call("linears_forward", [qkv], [keep], tokens, *of_qkv, kept.qkv_TN, kept.thin_qkv, kept.rstd_T)
        _attend("attention_forward", layer, settings, (cos_TR, sin_TR), kept, tokens)
        of_o = kept.attended_TN, None, ctypes.c_float(0), x_TD
        call("linears_forward", [o], [keep_o], tokens, *of_o, kept.middle_TD, kept.thin_o, None)
        of_mlp = kept.middle_TD, norm_mlp, ctypes.c_float(eps_mlp)
        into = y_TD, kept.gate_up_T2F, kept.thin_gate_up, kept.thin_down, kept.rstd_mlp_T
        call("mlp_forward", [gate_up, down], keeps_mlp, tokens, *of_mlp, *into)

        # What trains mustn't change meanwhile; all layers keep the same angles.
        ctx.save_for_backward(x_TD, piece, norm, norm_mlp, cos_TR, sin_TR, *keeps, *trained)
        ctx.layer, ctx.settings = layer, settings
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, piece, norm, norm_mlp, cos_TR, sin_TR, keep, keep_o, *keeps_mlp = ctx.saved_tensors[:10]
        layer: Ready = ctx.layer
        tokens, (qkv, o, gate_up, down) = len(x_TD), layer.asked
        kept = _Kept(*_carve(piece, tokens, layer.kept_bytes))
        gradients = [part.new_gradients() for part in layer.asked]
        within = _piece(x_TD, tokens, layer.gradient_bytes)
        dmiddle_TD, dattended_TN, dqkv_TN = _carve(within, tokens, layer.gradient_bytes)
        dx_TD = empty_rows(x_TD, *x_TD.shape) if ctx.needs_input_grad[2] else None
        # Not below the first adapted layer.
        wants_qkv = dx_TD is not None or qkv.ranks > 0
        wants_o = wants_qkv or o.ranks > 0

        of_mlp = kept.middle_TD, norm_mlp, kept.rstd_mlp_T, kept.gate_up_T2F, kept.thin_gate_up, kept.thin_down
        to = dmiddle_TD if wants_o else None
        call("mlp_backward", [gate_up, down], keeps_mlp, tokens, dy_TD.contiguous(), *of_mlp, to)
        if wants_o:
            of_o = dmiddle_TD, kept.attended_TN, None, None, kept.thin_o
            call("linears_backward", [o], [keep_o], tokens, *of_o, None, dattended_TN if wants_qkv else None)
        if wants_qkv:
            own = dattended_TN, dqkv_TN
            _attend("attention_backward", layer, ctx.settings, (cos_TR, sin_TR), kept, tokens, *own)
            of_qkv = dqkv_TN, x_TD, norm, kept.rstd_T, kept.thin_qkv
            call("linears_backward", [qkv], [keep], tokens, *of_qkv, dmiddle_TD, dx_TD)
        of_all = [d for part, own in zip(layer.asked, gradients, strict=True) for d in part.as_trained(own)]
        return None, None, dx_TD, None, None, *of_all
