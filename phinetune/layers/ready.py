"""A decoder layer as it is at this moment: its linear layers, norms and attention, and how C++ kernels read them.

fast.py looks at a layer's modules and makes one; the parts of decoder.py and the whole of whole.py compute with it.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phinetune.kernels import flash, native
from phinetune.layers import blockwise
from phinetune.layers.asked import Asked
from phinetune.lora.functional import Projection


class Parts(NamedTuple):
    """The linear layers of a decoder layer, as they are at this moment."""

    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection


class Norm(NamedTuple):
    """An RMSNorm."""

    weight_D: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        return cls(module.weight, module.variance_epsilon)


class Attention(NamedTuple):
    """What attention is told, as phinetune.kernels.attention takes it."""

    kv_heads: int
    scaling: float
    window: int | None
    head_width: int


class Ready:
    """A decoder layer as it is at this moment, and as the kernels read it."""

    def __init__(self, parts: Parts, norms: tuple[Norm, Norm], attention: Attention) -> None:
        self.parts, self.norms, self.attention = parts, norms, attention

    def serves(self, x_TD: Tensor) -> bool:
        """Whether the kernels compute the whole layer."""
        return len(x_TD) > 0 and native.is_plain(x_TD, torch.bfloat16) and self._is_held

    @functools.cached_property
    def _is_held(self) -> bool:
        qkv, o, gate_up, down = self.parts
        held = blockwise.are_held(qkv) and blockwise.are_held(o) and blockwise.are_held(gate_up, down)
        return held and flash.is_for(self.attention.head_width, torch.bfloat16)

    @functools.cached_property
    def asked(self) -> list[Asked]:
        return [Asked(part) for part in self.parts]

    @functools.cached_property
    def trained(self) -> list[Tensor]:
        """A and B of each update, as an autograd function is given them."""
        return [factor for part in self.parts for factor in part.trained]

    @functools.cached_property
    def kept_bytes(self) -> list[int]:
        """A token's, of each that `_Kept` names."""
        qkv, o, gate_up, _ = self.asked
        elements = qkv.outputs, o.inputs, o.outputs, gate_up.outputs, *(part.padded for part in self.asked)
        return [4, 4, 4 * (o.inputs // self.attention.head_width), *(2 * count for count in elements)]

    @functools.cached_property
    def gradient_bytes(self) -> list[int]:
        """The same of the gradients within a layer: of what is behind attention, of attention, of q k v."""
        qkv, o, *_ = self.asked
        return [2 * o.outputs, 2 * o.inputs, 2 * qkv.outputs]
