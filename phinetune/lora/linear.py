"""Linear layers with LoRA: `Linear`, and `MergedLinear` for one `nn.Linear` that stands for several."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.lora.functional import Block, Factors, Projection, delta_weight, lora_linear, low_rank, stack
from phinetune.lora.layer import DEFAULT, NO_ADAPTERS, Adapter, LoRALayer, Product, full_precision


class Linear(LoRALayer, nn.Linear):
    """`nn.Linear` with a low-rank update: y = x Wᵀ + b + (lora_alpha / r) · dropout(x) Aᵀ Bᵀ.

    Args:
        in_features, out_features: as in `nn.Linear`.
        r: rank; 0 gives the plain layer.
        lora_alpha: the update is scaled by `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
        lora_dropout: share of the inputs of A dropped in training, 0 ≤ p < 1.
        fan_in_fan_out: the weight is stored (in, out), as GPT-2's Conv1D does.
        merge_weights: `eval()` merges, `train()` unmerges.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        use_dora: learns the norm of each output's weights apart from their direction (Liu et al., 2024).
        init_lora_weights: True (A kaiming-uniform, B zeros), "gaussian" (A from N(0, 1/r²)), "pissa" (A and B from
            the r largest singular values of W, Meng et al., 2024), "pissa_niter_N" (the same by N iterations of a
            randomised SVD), "olora" (from W's QR decomposition, Büyükakyüz, 2024), or False (both random: for
            tests). PiSSA and OLoRA learn W + s·(BA − B₀A₀); W itself isn't written.
        **kwargs: `bias`, `device`, `dtype`, as in `nn.Linear`.

    Shapes:
        input (..., in_features), output (..., out_features), `lora_A` (r, in_features), `lora_B` (out_features, r).

    Raises:
        ValueError: for a negative r, a dropout outside [0, 1), or an unknown `init_lora_weights`.
    """

    _plain_type = nn.Linear
    fan_in_fan_out = False

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
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self.merge_weights = merge_weights
        adapter = self.make_adapter(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
        )
        self._begin(adapter, fan_in_fan_out)

    def _begin(self, adapter: Adapter, fan_in_fan_out: bool) -> None:
        if 0 in self._shapes(adapter)[0]:
            self._asked_for = adapter
        else:
            self._register(DEFAULT, adapter)
        self.reset_parameters()  # a second time, as loralib does: the same seed gives the same layer
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()
            self.fan_in_fan_out = True

    def reset_parameters(self) -> None:
        fan_in_fan_out = self.fan_in_fan_out
        if fan_in_fan_out:  # everything is drawn as (out, in)
            self.weight.data, self.fan_in_fan_out = self.weight.data.T, False
        super().reset_parameters()
        if fan_in_fan_out:
            self.weight.data, self.fan_in_fan_out = self.weight.data.T, True

    def make_adapter(
        self,
        enable_lora: Sequence[bool | int] | None = None,
        out_splits: Sequence[int] | None = None,
        **given: Any,
    ) -> Adapter:
        """An adapter for this layer, or for some of its parts: flags and rows of each, as in `MergedLinear`."""
        adapter = Adapter(**given)
        if enable_lora is None:
            if isinstance(adapter.r, list):
                raise ValueError(f"r={adapter.r}: a rank for each part needs enable_lora")
            enable_lora, out_splits = [True], [self.out_features]
        splits = _settle_splits(self.out_features, enable_lora, out_splits)
        ranks = adapter.r if isinstance(adapter.r, list) else [adapter.r] * len(splits)
        scalings = adapter.scaling if isinstance(adapter.scaling, list) else [adapter.scaling] * len(splits)
        if len(ranks) != len(splits):
            raise ValueError(f"r={adapter.r}: must be one rank, or one for each of {len(splits)} parts")
        blocks: list[Block] = []
        out = a = b = 0
        for rows, enabled, r, scaling in zip(splits, enable_lora, ranks, scalings, strict=True):
            if enabled and r > 0:
                blocks.append(Block(slice(out, out + rows), slice(a, a + r), slice(b, b + rows * r), scaling))
                a, b = a + r, b + rows * r
            out += rows
        adapter.blocks = tuple(blocks)
        return adapter

    def _shapes(self, adapter: Adapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """lora_B is (rows, r) where all parts have one rank, else its elements in a row."""
        ranks = {block.a.stop - block.a.start for block in adapter.blocks}
        if not ranks:
            return (0, self.in_features), (0, 0)
        elements = adapter.blocks[-1].b.stop
        shape_B = (elements // max(ranks), max(ranks)) if len(ranks) == 1 else (elements,)
        return (adapter.blocks[-1].a.stop, self.in_features), shape_B

    def _initialise(self, adapter_name: str) -> None:
        adapter = self.adapters[adapter_name]
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        init = adapter.init_lora_weights
        whole_B = lora_B.new_zeros(lora_B.shape)  # row-major, so that blocks of it are views, whatever lora_B is
        if isinstance(init, bool):
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        for block in adapter.blocks if init is not True else ():
            A, B, r = lora_A[block.a], block.read_B(whole_B), block.a.stop - block.a.start
            if init is False:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5))
            elif init == "gaussian":
                nn.init.normal_(A, std=1 / r)
            else:
                weight = self._base_weight[block.out].to(torch.promote_types(A.dtype, torch.float32))
                begun_A, begun_B = _principal_factors(weight, r, str(init), block.scaling)
                A.copy_(begun_A)
                B.copy_(begun_B)
        lora_B.copy_(whole_B)

    def factors(self, adapter_name: str = DEFAULT) -> Factors:
        """What the adapter adds; PiSSA and OLoRA take off what they began with."""
        adapter = self.adapters[adapter_name]
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        own = Factors(lora_A, lora_B, adapter.blocks)
        if not adapter.begins_at_product:
            return own
        lora_A0, lora_B0 = self.lora_tensor("lora_A0", adapter_name), self.lora_tensor("lora_B0", adapter_name)
        return stack([(own, 1.0), (Factors(lora_A0, lora_B0, adapter.blocks), -1.0)])

    @property
    def _base_weight(self) -> Tensor:
        """(out, in), whatever the layout of the storage."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    def _to_storage(self, weight: Tensor) -> Tensor:
        return weight if issubclass(self._plain_type, nn.Linear) else weight.T

    def _base(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def _adapted(self, input: Tensor) -> Tensor:
        """In one autograd function; several adapters share the dropout mask of the one that drops most."""
        if any(self.adapters[name].use_dora for name in self.active_adapters):
            return super()._adapted(input)
        (weight,), (bias,), (factors,), dropout_p = self.projection()
        return lora_linear(input, weight, bias, factors, dropout_p)

    def projection(self) -> Projection:
        """What the layer computes, as its weights and factors; DoRA, which isn't a sum of products, has none."""
        active = self.active_adapters if self.lora_enabled else NO_ADAPTERS
        updates = (stack([(self.factors(name), weight) for name, weight in active.items()]),) if active else ()
        return Projection(
            (self._base_weight,), (self._cast_bias(),), updates, max([0.0, *map(self._dropout_p, active)])
        )

    def _update(self, input: Tensor, adapter_name: str) -> Tensor:
        return low_rank(input, self.factors(adapter_name), self.out_features, self._dropout_p(adapter_name))

    def delta_weight(self, adapter_name: str = DEFAULT) -> Tensor:
        """ΔW (out_features, in_features) in fp32 (fp64 for fp64 parameters)."""
        with full_precision(self.weight.device):
            return delta_weight(self.factors(adapter_name), self.out_features)

    @torch.no_grad()
    def product(self, adapter_name: str = DEFAULT) -> Product:
        """ΔW = scaling · B @ A: parts and what PiSSA took off become rows of A and zero-padded columns of B."""
        lora_A, lora_B, blocks = self.factors(adapter_name)
        scaling = max((block.scaling for block in blocks), key=abs) or 1.0
        if len({abs(block.scaling) for block in blocks}) > 1:
            lora_B = lora_B.to(torch.promote_types(lora_B.dtype, torch.float32))
        expanded = lora_B.new_zeros(self.out_features, lora_A.shape[0])
        for block in blocks:
            expanded[block.out, block.a] = block.read_B(lora_B) * (block.scaling / scaling)
        return Product(lora_A.detach(), expanded, scaling)

    @torch.no_grad()
    def load_product(self, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        """From B its diagonal blocks are taken."""
        own_A, own_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        own_A.copy_(lora_A)
        blocks = [lora_B[block.out, block.a].flatten() for block in self.adapters[adapter_name].blocks]
        own_B.copy_(torch.cat(blocks).view(own_B.shape))

    def _adapted_outputs(self, adapter: Adapter) -> list[slice]:
        return [block.out for block in adapter.blocks]

    def _taken_over(self) -> None:
        """transformers' Conv1D has its weight as (in, out) and no in_features."""
        if not issubclass(self._plain_type, nn.Linear):
            self.fan_in_fan_out = True
            self.in_features, self.out_features = self.weight.shape

    def extra_repr(self) -> str:
        shown = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        for name, adapter in self.adapters.items():
            label = "" if name == DEFAULT else f"{name}: "
            shown.append(f"{label}r={adapter.r}, scaling={adapter.scaling}")
        return ", ".join(shown if self.has_lora else [*shown, "no LoRA"])


class MergedLinear(Linear):
    """One `nn.Linear` that stands for several, as a fused qkv does, with LoRA on some of them.

    Args:
        r: one rank, or a list with one for each layer (0 for none).
        lora_alpha: one value, or a list likewise.
        enable_lora: which of the layers get an update, one flag each.
        out_splits: rows of each layer, in order; equal shares by default, as in loralib.  With
            grouped-query attention they differ: Phi-3-medium's qkv is [5120, 1280, 1280].
        others: as in `Linear`.

    Shapes:
        with g layers enabled: `lora_A` (r·g, in_features), `lora_B` (rows of the enabled layers, r); where
        ranks differ, `lora_A` (Σ rᵢ, in_features) and `lora_B` (Σ rowsᵢ·rᵢ,), the layers' Bs in a row.

    Raises:
        ValueError: if the splits don't add up to out_features, or their number isn't that of the flags.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int | list[int] = 0,
        lora_alpha: float | list[float] = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool | int] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        out_splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.merge_weights = merge_weights
        adapter = self.make_adapter(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            enable_lora=enable_lora,
            out_splits=out_splits,
        )
        self._begin(adapter, fan_in_fan_out)

    def make_adapter(
        self,
        enable_lora: Sequence[bool | int] | None = None,
        out_splits: Sequence[int] | None = None,
        **given: Any,
    ) -> Adapter:
        adapter = super().make_adapter(enable_lora, out_splits, **given)
        if not self.has_lora:
            self.enable_lora = [True] if enable_lora is None else [bool(flag) for flag in enable_lora]
            self.out_splits = _settle_splits(self.out_features, self.enable_lora, out_splits)
        return adapter

    def extra_repr(self) -> str:
        return super().extra_repr() + f", out_splits={self.out_splits}, enable_lora={self.enable_lora}"


def _settle_splits(out_features: int, enable_lora: Sequence[Any], out_splits: Sequence[int] | None) -> list[int]:
    if out_splits is None:
        if out_features % len(enable_lora) != 0:
            raise ValueError(
                f"out_features={out_features} doesn't divide by the {len(enable_lora)} layers of "
                "enable_lora: give out_splits"
            )
        out_splits = [out_features // len(enable_lora)] * len(enable_lora)
    if len(out_splits) != len(enable_lora) or sum(out_splits) != out_features:
        raise ValueError(
            f"out_splits={list(out_splits)} must have {len(enable_lora)} parts (one a flag of "
            f"enable_lora) that add up to out_features={out_features}"
        )
    return list(out_splits)


def _principal_factors(weight: Tensor, r: int, init: str, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) that PiSSA and OLoRA begin with.

    PiSSA: scaling · B A is the part of W of the r largest singular values, its roots in A and in B alike.
    OLoRA: B = Q[:, :r], A = R[:r] of W = Q R.

    Raises:
        ValueError: for a rank or a scaling that can't be.
    """
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights={init!r}: r={r} is more than the rank of a {tuple(weight.shape)} weight")
    if init == "olora":
        q, triangle = torch.linalg.qr(weight)
        return triangle[:r], q[:, :r]
    if scaling <= 0:
        raise ValueError(f"init_lora_weights={init!r} takes a root of lora_alpha, which must be above 0")
    _, _, iterations = init.partition("_niter_")
    if iterations:
        u, s, v = torch.svd_lowrank(weight, q=r, niter=int(iterations))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
