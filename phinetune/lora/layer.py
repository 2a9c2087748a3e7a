"""What every LoRA layer is, whatever its `nn` base: adapters by name, merging, DoRA, taking over a live layer.

One rule differs from loralib on purpose: **the base weight is never written**.  Merging builds W + ΔW
beside it, in fp32 with one rounding, so a state dict always holds the pristine base, any number of
eval/train cycles leaves it bit-equal, and a weight tied to another layer stays what it was.
"""

import copy
import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from phinetune.kernels.quantised import QuantisedWeight
from phinetune.lora.functional import Block

DEFAULT = "default"
STALE = (None, None)  # in the place of a merged weight: it is built when it is next used
INITIALISATIONS = r"gaussian|pissa|pissa_niter_\d+|olora"
NO_ADAPTERS: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Adapter:
    """One adapter's settings in one layer; its tensors are parameters of the layer.

    `r`, `lora_alpha` and `scaling` are lists, one for each part, where the parts of a layer differ.
    """

    r: int | list[int]
    lora_alpha: float | list[float] = 1
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    scaling: Any = field(init=False)
    blocks: tuple[Block, ...] = ()
    """Of a linear layer: its low-rank products."""
    layout: str = "peft"
    """Of a convolution: how A and B make ΔW."""

    def __post_init__(self) -> None:
        ranks = self.r if isinstance(self.r, list) else [self.r]
        if any(r < 0 for r in ranks):
            raise ValueError(f"r={self.r}: a LoRA rank is 0 (no LoRA) or more")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be in [0, 1)")
        if not isinstance(self.init_lora_weights, bool) and not re.fullmatch(INITIALISATIONS, self.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r}: must be true, false, gaussian, pissa, pissa_niter_N "
                "(N a number) or olora"
            )
        alphas = self.lora_alpha if isinstance(self.lora_alpha, list) else [self.lora_alpha] * len(ranks)
        if len(alphas) > len(ranks):
            ranks = ranks * len(alphas)
            self.r = ranks
        if len(alphas) != len(ranks):
            raise ValueError(f"lora_alpha={self.lora_alpha}: must be one value, or one for each of {len(ranks)} ranks")
        scalings = [self._scale(a, r) if r else 0.0 for a, r in zip(alphas, ranks, strict=True)]
        self.scaling = scalings if isinstance(self.r, list) else scalings[0]

    @property
    def begins_at_product(self) -> bool:
        """PiSSA and OLoRA begin at B₀A₀ ≠ 0 and take it off the base: W + s·(BA − B₀A₀)."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    def refuse(self, *initialisations: str, of: str) -> None:
        """Raises ValueError for initialisations that a kind of layer doesn't have."""
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(initialisations):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} isn't an initialisation of {of}")

    def _scale(self, lora_alpha: float, r: int) -> float:
        """alpha / r, or alpha / √r where rank-stabilised (Kalajdzievski, 2023)."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)


class Product(NamedTuple):
    """An adapter in one layer as one product of two matrices: ΔW = scaling · B @ A."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class LoRALayer(nn.Module):
    """The part that all LoRA layers share; a subclass says how its low-rank update is computed.

    Parameters are called `lora_A`, `lora_B` and, with DoRA, `lora_magnitude_vector` for the adapter "default",
    `lora_A_NAME`, … for others.
    """

    weight: Tensor
    bias: Any
    merge_weights = False
    lora_enabled = True
    adapters: Mapping[str, Adapter] = NO_ADAPTERS
    active_adapters: Mapping[str, float] = NO_ADAPTERS
    """Name -> weight of the adapters that the forward pass adds up."""
    _asked_for: Adapter | None = None
    """What the constructor was given, where that adds nothing: r=0, or no part enabled."""
    _merged: tuple[Tensor | None, Any] | None = None
    _plain_type: type[nn.Module]
    _output_dim: ClassVar[int] = 0
    """The dimension of `_base_weight` that counts outputs."""

    # What a kind of layer knows -------------------------------------------------------------------------

    def _shapes(self, adapter: Adapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of lora_A and lora_B."""
        raise NotImplementedError

    def _initialise(self, adapter_name: str) -> None:
        """Fills lora_A and lora_B by `init_lora_weights`."""
        raise NotImplementedError

    def _base(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer's function of input and weight."""
        raise NotImplementedError

    def _update(self, input: Tensor, adapter_name: str) -> Tensor:
        """What an adapter adds to the output: scaling · B(A(dropout(input)))."""
        raise NotImplementedError

    def delta_weight(self, adapter_name: str = DEFAULT) -> Tensor:
        """ΔW = scaling · B A in fp32 (fp64 for fp64 parameters), in the layout of `_base_weight`."""
        raise NotImplementedError

    def product(self, adapter_name: str = DEFAULT) -> Product:
        """The adapter as one A and one B, detached; DoRA's magnitudes aren't part of it."""
        raise NotImplementedError

    @torch.no_grad()
    def load_product(self, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        """Fills an adapter with the matrices of `product`; its scaling stays."""
        for kind, value in (("lora_A", lora_A), ("lora_B", lora_B)):
            own = self.lora_tensor(kind, adapter_name)
            own.copy_(value.reshape(own.shape))

    @property
    def _base_weight(self) -> Tensor:
        return self.weight

    def _along_outputs(self, values: Tensor) -> Tensor:
        """One value an output, shaped to multiply the layer's output."""
        return values

    # Adapters -------------------------------------------------------------------------------------------

    @property
    def has_lora(self) -> bool:
        """False for r=0 and for a `MergedLinear` with no part enabled: such a layer is a plain one."""
        return bool(self.adapters)

    @property
    def r(self) -> Any:
        return self._first.r

    @property
    def lora_alpha(self) -> Any:
        return self._first.lora_alpha

    @property
    def lora_dropout(self) -> float:
        return self._first.lora_dropout

    @property
    def scaling(self) -> Any:
        """Of the default adapter (else the first); may be set, as in loralib."""
        return self._first.scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._first.scaling = value
        self._first.blocks = tuple(block._replace(scaling=value) for block in self._first.blocks)
        if self.merged:
            self.merge()

    @property
    def _first(self) -> Adapter:
        named = self.adapters.get(DEFAULT) or next(iter(self.adapters.values()), None)
        return named or self._asked_for or Adapter(r=0)

    def add_adapter(self, adapter_name: str, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        """Registers an adapter's parameters, freshly drawn. The first one is active at once, others when set.

        A rank of 0 adds nothing.

        Raises:
            ValueError: if there is one of that name, or it can't be a name.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter_name):
            raise ValueError(f"adapter_name={adapter_name!r}: letters, digits, _ and - only")
        if adapter_name in self.adapters:
            raise ValueError(f"adapter_name={adapter_name!r}: the layer has an adapter of that name")
        if 0 not in self._shapes(adapter)[0]:
            self._register(adapter_name, adapter, dtype)
            try:
                self.reset_lora_parameters(adapter_name)
            except ValueError:
                self.delete_adapter(adapter_name)
                raise

    def _register(self, adapter_name: str, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        like: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        shape_A, shape_B = self._shapes(adapter)
        kinds = {"lora_A": shape_A, "lora_B": shape_B}
        if adapter.use_dora:
            kinds["lora_magnitude_vector"] = (sum(s.stop - s.start for s in self._adapted_outputs(adapter)),)
        for kind, shape in kinds.items():
            self.register_parameter(tensor_name(kind, adapter_name), nn.Parameter(torch.empty(shape, **like)))
        if adapter.begins_at_product:
            for kind, shape in (("lora_A0", shape_A), ("lora_B0", shape_B)):
                self.register_buffer(tensor_name(kind, adapter_name), torch.empty(shape, **like))
        self.weight.requires_grad_(False)
        if not self.has_lora:
            self.register_forward_pre_hook(be_called)
        self.adapters = {**self.adapters, adapter_name: adapter}
        if len(self.adapters) == 1:
            self.active_adapters = {adapter_name: 1.0}

    def delete_adapter(self, adapter_name: str) -> None:
        """Drops an adapter with its parameters; the layer stays what it is, a plain one without its last."""
        for kind in TENSOR_KINDS:
            if hasattr(self, tensor_name(kind, adapter_name)):
                delattr(self, tensor_name(kind, adapter_name))
        self.adapters = {n: a for n, a in self.adapters.items() if n != adapter_name}
        if not self.has_lora:
            _remove_hook(self)
        self.active_adapters = {n: w for n, w in self.active_adapters.items() if n != adapter_name}

    def lora_tensor(self, kind: str, adapter_name: str = DEFAULT) -> Tensor:
        """One of `TENSOR_KINDS`; lora_A0 and lora_B0 are where PiSSA and OLoRA began."""
        tensor: Tensor = getattr(self, tensor_name(kind, adapter_name))
        return tensor

    def lora_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """All tensors of an adapter by their names in the layer."""
        names = [tensor_name(kind, adapter_name) for kind in TENSOR_KINDS]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        for name in self.adapters:
            self.reset_lora_parameters(name)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str = DEFAULT) -> None:
        """Draws an adapter anew: the layer begins as its base, unless `init_lora_weights` is False."""
        adapter = self.adapters[adapter_name]
        self._initialise(adapter_name)
        if adapter.begins_at_product:
            for kind in ("lora_A", "lora_B"):
                self.lora_tensor(kind + "0", adapter_name).copy_(self.lora_tensor(kind, adapter_name))
        if adapter.use_dora:
            self._reset_magnitude(adapter_name)

    @torch.no_grad()
    def _reset_magnitude(self, adapter_name: str) -> None:
        norm = self._norm(adapter_name)
        parts = [norm[outputs] for outputs in self._adapted_outputs(self.adapters[adapter_name])]
        self.lora_tensor("lora_magnitude_vector", adapter_name).copy_(torch.cat(parts))

    # Forward --------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if not (self.active_adapters and self.lora_enabled):
            return self._base(input, self._base_weight, self._cast_bias())
        if self._merged is not None:
            if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
                return self._base(input, self._merged_weight(), self._cast_bias())
            self.outdate()
        return self._adapted(input)

    def outdate(self) -> None:
        """Forgets a merged weight where gradients are asked for: what follows may change parameters without a trace."""
        self._merged = STALE if self.merged else self._merged

    def _cast_bias(self) -> Any:
        """A bias that trains in higher precision is rounded to the weight's."""
        return None if self.bias is None else self.bias.to(self.weight.dtype)

    def _adapted(self, input: Tensor) -> Tensor:
        """Base and updates by plain autograd. DoRA (Liu et al., 2024) scales each output of W + ΔW to a learnt norm."""
        plain = self._base(input, self._base_weight, None)
        output = plain
        for name, weight in self.active_adapters.items():
            update = self._update(input, name).to(plain.dtype)
            if self.adapters[name].use_dora:
                scale = self._along_outputs(self._dora_scale(name))
                update = (scale - 1).to(plain.dtype) * plain + scale.to(plain.dtype) * update
            output = output + weight * update
        return output if self.bias is None else output + self._along_outputs(self.bias).to(output.dtype)

    def _dropout_p(self, adapter_name: str) -> float:
        return self.adapters[adapter_name].lora_dropout if self.training else 0.0

    # DoRA -----------------------------------------------------------------------------------------------

    @property
    def _outputs(self) -> int:
        return self._base_weight.shape[self._output_dim]

    def _adapted_outputs(self, adapter: Adapter) -> list[slice]:
        """The outputs that an adapter changes."""
        return [slice(0, self._outputs)]

    @torch.no_grad()
    def _norm(self, adapter_name: str) -> Tensor:
        """‖W + ΔW‖ of each output, a constant to autograd (section 4.3 of the DoRA paper)."""
        with full_precision(self.weight.device):
            delta = self.delta_weight(adapter_name)
            weight = self._base_weight.to(delta.dtype) + delta
            others = [dim for dim in range(weight.ndim) if dim != self._output_dim]
            norm: Tensor = torch.linalg.vector_norm(weight, dim=others)
        return norm

    def _dora_scale(self, adapter_name: str) -> Tensor:
        """m / ‖W + ΔW‖ for each output, 1 for those that the adapter leaves alone and where all weights are 0."""
        norm = self._norm(adapter_name)
        magnitude, is_zero = self._magnitude(adapter_name, norm), norm == 0
        return magnitude.masked_fill(is_zero, 1) / norm.masked_fill(is_zero, 1)

    def magnitude(self, adapter_name: str = DEFAULT) -> Tensor:
        """DoRA's m for each output; for those that the adapter leaves alone, the norm that they have."""
        return self._magnitude(adapter_name, self._norm(adapter_name))

    def _magnitude(self, adapter_name: str, norm: Tensor) -> Tensor:
        learnt = self.lora_tensor("lora_magnitude_vector", adapter_name)
        parts: list[Tensor] = []
        start = read = 0
        for outputs in self._adapted_outputs(self.adapters[adapter_name]):
            rows = outputs.stop - outputs.start
            parts += [norm[start : outputs.start], learnt[read : read + rows].to(norm.dtype)]
            start, read = outputs.stop, read + rows
        return torch.cat([*parts, norm[start:]])

    # Merging --------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return self._merged is not None

    def merge(self) -> None:
        """Builds W + ΔW of the active adapters; the forward pass uses it wherever no gradient is asked for.

        It is built anew when parameters are loaded, stepped, replaced or switched; a write through `.data` isn't
        noticed, as nowhere in torch: call `merge` again behind one.
        """
        if self.active_adapters:
            self._merged = self.merge_weight(), self._merge_key()

    def unmerge(self) -> None:
        """Drops W + ΔW. The base weight was never touched, so there is nothing to subtract."""
        self._merged = None

    @torch.no_grad()
    def merge_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + Σ weight · ΔW of the active adapters, summed in fp32, rounded once, in the layout of `_base_weight`; in
        W's dtype by default."""
        base = self._weight_to_merge()
        precise = torch.promote_types(base.dtype, torch.float32)
        total = base.dequantise(precise) if isinstance(base, QuantisedWeight) else base.to(precise, copy=True)
        for name, weight in self.active_adapters.items():
            delta = self.delta_weight(name)
            if self.adapters[name].use_dora:
                shape = [-1 if dim == self._output_dim else 1 for dim in range(base.ndim)]
                scale = self._dora_scale(name).view(shape)
                delta = scale * (base.to(delta.dtype) + delta) - base.to(delta.dtype)
            total += weight * delta
        return total.to(dtype or base.dtype)

    def _weight_to_merge(self) -> Tensor:
        return self._base_weight

    def _merged_weight(self) -> Tensor:
        assert self._merged is not None
        weight, key = self._merged
        if weight is None or key != self._merge_key():  # weights were loaded, stepped or switched since
            self.merge()
            weight = self._merged[0]
        assert weight is not None
        return weight

    def _merge_key(self) -> Any:
        """Changes whenever something that the merged weight was made of does."""
        present = [p for p in self._parameters.values() if p is not None]
        parameters = [(id(p), p.data_ptr(), _version(p)) for p in present]
        return parameters, dict(self.active_adapters), _steps if any(p.requires_grad for p in present) else None

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

    def __getstate__(self) -> dict[str, Any]:
        """A pickle or a copy holds no merged weight: it is built again when first used."""
        return {**self.__dict__, "_merged": STALE} if self.merged else self.__dict__

    # In and out -----------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """DoRA's magnitudes, PiSSA and OLoRA begin at the base: a base that comes later begins them anew."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, adapter in self.adapters.items() if f"{prefix}weight" in state_dict else ():
            comes_along = any(prefix + own in state_dict for own in self.lora_tensors(name))
            if comes_along or self.weight.is_meta or not self._at_its_beginning(name):
                continue
            if adapter.begins_at_product:
                self.reset_lora_parameters(name)
            elif adapter.use_dora:
                self._reset_magnitude(name)

    def _at_its_beginning(self, adapter_name: str) -> bool:
        """Whether ΔW is 0, as it is when drawn."""
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        if self.adapters[adapter_name].begins_at_product:
            begun = [self.lora_tensor(kind, adapter_name) for kind in ("lora_A0", "lora_B0")]
            return torch.equal(lora_A, begun[0]) and torch.equal(lora_B, begun[1])
        return not (lora_A.any() and lora_B.any())

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        *,
        adapter_name: str = DEFAULT,
        merge_weights: bool = False,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Self:
        """Takes over a live layer's own weight and bias (no copies), its hooks and its other attributes.

        Handles of its hooks remove them from the old layer only.  `settings` are those of the layer's constructor: r,
        lora_alpha, …; `dtype` is that of the LoRA parameters
        (the base's by default).
        """
        layer = cls.__new__(cls)
        _copy_attributes(base, layer)
        layer._plain_type, layer.merge_weights = type(base), merge_weights
        layer._taken_over()
        layer.add_adapter(adapter_name, layer.make_adapter(**settings), dtype)
        return layer

    def _taken_over(self) -> None:
        """Completes what the base layer's class doesn't have."""

    def make_adapter(self, **given: Any) -> Adapter:
        """An adapter for this layer."""
        return Adapter(**given)

    def to_base(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A plain layer of the kind that was taken over, with the active adapters folded in; in the base's dtype by
        default."""
        plain = self._plain_type.__new__(self._plain_type)
        _copy_attributes(self, plain)
        for name in [*self.__dict__, *self._parameters, *self._buffers]:
            if name.startswith("lora_") or name in _OWN_ATTRIBUTES:
                for holder in (plain.__dict__, plain._parameters, plain._buffers):
                    holder.pop(name, None)
        _remove_hook(plain)
        dtype = dtype or self.weight.dtype
        if self.bias is not None and self.bias.dtype != dtype:
            plain.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        weight = self._to_storage(self.merge_weight(dtype) if self.active_adapters else self._base_weight.to(dtype))
        if weight is not self.weight:
            plain.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        return plain

    def _to_storage(self, weight: Tensor) -> Tensor:
        """From the layout of `_base_weight` to that of the plain layer."""
        return weight


_steps = 0


def _count_step(*_: Any) -> None:
    """Optimisers' steps are counted, all alike: torch's fused ones, and others' own, change a parameter without its
    version."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)

TENSOR_KINDS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_A0", "lora_B0")
_OWN_ATTRIBUTES = (
    *("adapters", "active_adapters", "merge_weights", "_merged", "_plain_type", "fan_in_fan_out"),
    *("enable_lora", "out_splits", "_asked_for"),
)


def tensor_name(kind: str, adapter_name: str) -> str:
    """Of a parameter in its layer; loralib's own name for the default adapter."""
    return kind if adapter_name == DEFAULT else f"{kind}_{adapter_name}"


def be_called(module: nn.Module, args: Any) -> None:
    """Does nothing: where a hook is, torch's fused TransformerEncoderLayer calls its layers, and doesn't read past
    them."""


def _remove_hook(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is be_called:
            del module._forward_pre_hooks[key]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: the weights' own arithmetic isn't rounded because a forward pass is."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Everything a module has, its tables copied and its tensors shared."""
    for key, value in source.__dict__.items():
        target.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
