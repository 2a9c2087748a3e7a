"""LoRA layers with loralib's interface: `import phinetune.lora as lora` in place of `import loralib as lora`.

One rule differs from loralib on purpose: **the base weight is never written**.  Merging builds W + ΔW
beside it, in fp32 with one rounding, so a state dict always holds the pristine base, any number of
eval/train cycles leaves it bit-equal, and a weight tied to another layer stays what it was.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.lora.functional import Block, delta_weight, lora_linear


class LoRALayer:
    """What every LoRA layer has beside its `nn` base: the low-rank parameters and the merged weight."""

    r: int
    lora_alpha: float
    scaling: float
    lora_dropout: float
    merge_weights: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_enabled = True
    _merged: tuple[Tensor, tuple[int, ...]] | None = None

    @property
    def has_lora(self) -> bool:
        """False for r=0 and for a `MergedLinear` with no block enabled: such a layer is a plain one."""
        return "lora_A" in self._parameters  # type: ignore[attr-defined]

    @property
    def merged(self) -> bool:
        return self._merged is not None

    def merge(self) -> None:
        """Builds W + ΔW; the forward pass uses it wherever no gradient is asked for."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Drops W + ΔW. The base weight was never touched, so there is nothing to subtract."""
        self._merged = None


class Linear(nn.Linear, LoRALayer):
    """`nn.Linear` with a low-rank update: y = x Wᵀ + b + (lora_alpha / r) · dropout(x) Aᵀ Bᵀ.

    Args:
        in_features, out_features: as in `nn.Linear`.
        r: rank; 0 gives the plain layer.
        lora_alpha: the update is scaled by `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
        lora_dropout: share of the inputs of A dropped in training, 0 ≤ p < 1.
        fan_in_fan_out: the weight is stored (in, out), as GPT-2's Conv1D does.
        merge_weights: `eval()` merges, `train()` unmerges.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        **kwargs: `bias`, `device`, `dtype`, as in `nn.Linear`.

    Shapes:
        input (..., in_features), output (..., out_features), `lora_A` (r, in_features), `lora_B` (out_features, r).

    Raises:
        ValueError: for a negative r or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self._add_lora(r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, use_rslora)
        self.reset_parameters()  # a second time, as loralib does: the same seed gives the same layer
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    @classmethod
    def from_base(
        cls,
        base: nn.Linear,
        *,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
        **layout: Any,
    ) -> Self:
        """Takes over a live layer's weight and bias, without a copy.

        `dtype` is that of the LoRA parameters (the base's by default); `layout` is `enable_lora` and
        `out_splits` for a `MergedLinear`.
        """
        has_bias = base.bias is not None
        layer = cls(base.in_features, base.out_features, bias=has_bias, device="meta", **layout)
        layer.weight, layer.bias = base.weight, base.bias
        layer._add_lora(r, lora_alpha, lora_dropout, False, merge_weights, use_rslora, dtype=dtype)
        layer.reset_lora_parameters()
        return layer.train(base.training)

    def to_base(self) -> nn.Linear:
        """A plain `nn.Linear` with W + ΔW; the reverse of `from_base`."""
        base = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self._merge_weight() if self.has_lora else self._base_weight.detach()
        base.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        base.bias = self.bias
        return base.train(self.training)

    def _add_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        fan_in_fan_out: bool,
        merge_weights: bool,
        use_rslora: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        if r < 0:
            raise ValueError(f"r={r}: a LoRA rank is 0 (no LoRA) or more")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout={lora_dropout}: must be in [0, 1)")
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.fan_in_fan_out, self.merge_weights, self.use_rslora = fan_in_fan_out, merge_weights, use_rslora
        self.blocks = self._layout_blocks(r) if r > 0 else ()
        if self.blocks:
            self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
            rows_A, rows_B = self.blocks[-1].a.stop, self.blocks[-1].b.stop
            like: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
            self.lora_A = nn.Parameter(torch.empty(rows_A, self.in_features, **like))
            self.lora_B = nn.Parameter(torch.empty(rows_B, r, **like))
            self.weight.requires_grad_(False)

    def _layout_blocks(self, r: int) -> tuple[Block, ...]:
        return (Block(out=slice(0, self.out_features), a=slice(0, r), b=slice(0, self.out_features)),)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.has_lora:
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A from kaiming_uniform(a=√5), B zeros: the layer begins as its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def _base_weight(self) -> Tensor:
        """(out, in), whatever the layout of the storage."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    def _merge_weight(self) -> Tensor:
        delta = delta_weight(self.lora_A, self.lora_B, self.scaling, self.blocks, self.out_features)
        return delta.add_(self._base_weight.detach()).to(self.weight.dtype)

    def _versions(self) -> tuple[int, ...]:
        return tuple(n for p in (self.weight, self.lora_A, self.lora_B) for n in (id(p), p._version))

    def merge(self) -> None:
        if self.has_lora:
            self._merged = self._merge_weight(), self._versions()

    def forward(self, input: Tensor) -> Tensor:
        if not (self.has_lora and self.lora_enabled):
            return F.linear(input, self._base_weight, self.bias)
        if self._merged is not None and not torch.is_grad_enabled():
            if self._merged[1] != self._versions():  # weights were loaded or stepped since
                self.merge()
            return F.linear(input, self._merged[0], self.bias)
        dropout_p = self.lora_dropout if self.training else 0.0
        return lora_linear(
            input, self._base_weight, self.bias, self.lora_A, self.lora_B, self.scaling, self.blocks, dropout_p
        )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights and not self.merged:
            self.merge()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Device and dtype moves: the merged weight is built again from what was moved."""
        super()._apply(fn, recurse)
        if self.merged:
            self.merge()
        return self

    def extra_repr(self) -> str:
        lora = f", r={self.r}, scaling={self.scaling:g}" if self.has_lora else ", no LoRA"
        return super().extra_repr() + lora


class MergedLinear(Linear):
    """One `nn.Linear` that stands for several, as a fused qkv does, with LoRA on some of them.

    Args:
        enable_lora: which of the layers get an update, one flag each.
        out_splits: rows of each layer, in order; equal shares by default, as in loralib.  With
            grouped-query attention they differ: Phi-3-medium's qkv is [5120, 1280, 1280].
        others: as in `Linear`.

    Shapes:
        with g layers enabled: `lora_A` (r·g, in_features), `lora_B` (rows of the enabled layers, r).

    Raises:
        ValueError: if the splits don't add up to out_features, or their number isn't that of the flags.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool | int] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        use_rslora: bool = False,
        out_splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.enable_lora = [bool(flag) for flag in enable_lora]
        if out_splits is None:
            if out_features % len(self.enable_lora) != 0:
                raise ValueError(
                    f"out_features={out_features} doesn't divide by the {len(self.enable_lora)} layers of "
                    "enable_lora: give out_splits"
                )
            out_splits = [out_features // len(self.enable_lora)] * len(self.enable_lora)
        self.out_splits = list(out_splits)
        if len(self.out_splits) != len(self.enable_lora) or sum(self.out_splits) != out_features:
            raise ValueError(
                f"out_splits={self.out_splits} must have {len(self.enable_lora)} parts (one a flag of "
                f"enable_lora) that add up to out_features={out_features}"
            )
        super().__init__(
            in_features,
            out_features,
            r,
            lora_alpha,
            lora_dropout,
            fan_in_fan_out,
            merge_weights,
            use_rslora,
            **kwargs,
        )

    def _layout_blocks(self, r: int) -> tuple[Block, ...]:
        blocks: list[Block] = []
        start = rows_B = 0
        for rows, enabled in zip(self.out_splits, self.enable_lora, strict=True):
            if enabled:
                a = slice(len(blocks) * r, (len(blocks) + 1) * r)
                blocks.append(Block(out=slice(start, start + rows), a=a, b=slice(rows_B, rows_B + rows)))
                rows_B += rows
            start += rows
        return tuple(blocks)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", out_splits={self.out_splits}, enable_lora={self.enable_lora}"
