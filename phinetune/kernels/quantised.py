"""Frozen weights in fewer bits than a float has, which look like the (N, K) tensor of floats that they stand for.

A kind (int8.py, bnb.py) says what it keeps and how its two products are made; here is what all kinds have in common.
Such a tensor can be the weight of an `nn.Linear`.  Copies, moves between devices, state dicts and pickles stay
quantised; anything else (`.float()`, `.T`, `w + 1`) is done on the dequantised weight and gives a plain tensor.  It
can't be written to, but for `copy_`, which quantises.
"""

from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

READ_ONLY = "can't be written to; dequantise() gives a plain tensor"
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class QuantisedWeight(Tensor):
    """The base of all kinds: of the floats it has shape, dtype and device; what it keeps are the tensors in `PARTS`
    (None for one that it does without) and the numbers and names in `SETTINGS`."""

    KIND: ClassVar[str]  # what a run's log says of it
    PARTS: ClassVar[tuple[str, ...]]
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def wrap(cls: Any, kept: dict[str, Any], size: Any, dtype: torch.dtype) -> Any:
        """A tensor of `size` that has no storage of its own; for the `__new__` of a kind."""
        device = kept[cls.PARTS[0]].device
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device, requires_grad=False)
        for name in (*cls.PARTS, *cls.SETTINGS):
            setattr(made, name, kept[name])
        return made

    # What a kind says of itself -------------------------------------------------------------------------

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain (N, K) weight, in its own dtype or another."""
        raise NotImplementedError

    def linear(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x Wᵀ (+ bias), (T, N) in x's dtype, differentiable in x and bias."""
        raise NotImplementedError

    def input_gradient(self, dy_TN: Tensor) -> Tensor:
        """dy W, (T, K) in dy's dtype: the gradient of what `linear` was given."""
        raise NotImplementedError

    def add_linear_(self, y_TN: Tensor, x_TK: Tensor) -> Tensor:
        """y += x Wᵀ, in place, each sum rounded once where products are of x's dtype; it records no gradient."""
        raise NotImplementedError

    def add_input_gradient_(self, dx_TK: Tensor, dy_TN: Tensor) -> Tensor:
        """dx += dy W, in place, rounded as `add_linear_` does."""
        raise NotImplementedError

    def quantised_alike(self, plain_NK: Tensor) -> Self:
        """Plain numbers, quantised as this weight is."""
        raise NotImplementedError

    def cast(self, plain_NK: Tensor) -> Self:
        """This weight, for it was dequantised to that for a cast, as one that stands for another dtype."""
        return self.quantised_alike(plain_NK)

    # What they have in common ---------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """{name: tensor, or None for one that this weight does without}"""
        return {name: getattr(self, name) for name in self.PARTS}

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SETTINGS}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What it takes in memory."""
        return sum(part.nbytes for part in self.parts.values() if part is not None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def _each(self, change: Any) -> Self:
        parts = {name: None if part is None else change(part) for name, part in self.parts.items()}
        return cast(Self, self.wrap(type(self), {**parts, **self.settings}, self.shape, self.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _as_parameter(self._each(torch.clone), self._is_parameter)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        kept = {**self.parts, **self.settings}
        return _rebuild, (type(self), kept, self.shape, self.dtype, self._is_parameter)

    @property
    def _is_parameter(self) -> bool:
        return isinstance(self, torch.nn.Parameter)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [name for name, part in self.parts.items() if part is not None], (self.settings, self.shape, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Any:
        settings, *rest = context
        return cls.wrap(cls, {**{name: inner.get(name) for name in cls.PARTS}, **settings}, *rest)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _nn_linear(*args, **(kwargs or {}))
        if func is Tensor.__setitem__ and isinstance(args[0], QuantisedWeight):
            raise RuntimeError(f"a quantised weight {READ_ONLY}")
        if func == SET_DATA:  # what nn.Module.to(dtype) does: the weight stays quantised and stands for another dtype
            weight, data = args
            given = data if isinstance(data, QuantisedWeight) else weight.cast(data)
            for name, kept in {**given.parts, **given.settings}.items():
                setattr(weight, name, kept)
            args = (weight, given)
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is no weight unless __torch_dispatch__ makes one
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten, first = torch.ops.aten, args[0]
        if func in (aten.detach.default, aten.alias.default):
            return first._each(lambda part: part)
        if func is aten.clone.default:
            return first._each(torch.clone)
        if func is aten._to_copy.default and isinstance(first, QuantisedWeight):
            dtype, device = kwargs.get("dtype") or first.dtype, kwargs.get("device")
            moved = first._each(lambda part: part.to(device))
            return moved if dtype == first.dtype else moved.dequantise(dtype)
        if func is aten.copy_.default and isinstance(first, QuantisedWeight):
            return first._take(args[1])
        if func._schema.is_mutable and any(isinstance(a, QuantisedWeight) for a in (first, kwargs.get("out"))):
            raise RuntimeError(f"{func}: a quantised weight {READ_ONLY}")
        args, kwargs = tree_map_only(QuantisedWeight, lambda weight: weight.dequantise(), (args, kwargs))
        return func(*args, **kwargs)

    def _take(self, source: Tensor) -> Self:
        """`copy_`: from its own kind as it is, from plain numbers quantised."""
        given = source if type(source) is type(self) else self.quantised_alike(source.expand(self.shape))
        for name, part in self.parts.items():
            if part is not None:
                part.copy_(getattr(given, name))
        return self


def _nn_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` where some of its tensors are quantised."""
    if not isinstance(weight, QuantisedWeight) or isinstance(input, QuantisedWeight):
        input, weight = (t.dequantise() if isinstance(t, QuantisedWeight) else t for t in (input, weight))
        return F.linear(input, weight, bias)
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # there is none on meta
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    y_TN = weight.linear(input.reshape(-1, input.shape[-1]), bias)
    return y_TN.view(*input.shape[:-1], y_TN.shape[-1])


def _rebuild(kind: Any, kept: dict[str, Any], size: Any, dtype: torch.dtype, is_parameter: bool) -> Any:
    return _as_parameter(kind.wrap(kind, kept, size, dtype), is_parameter)


def _as_parameter(weight: Tensor, wanted: bool) -> Tensor:
    return cast(Tensor, torch.nn.Parameter(weight, requires_grad=False)) if wanted else weight
