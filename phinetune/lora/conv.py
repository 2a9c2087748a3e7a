"""Convolutions with LoRA.

Two layouts of A and B, for a kernel of k₁ × … × k_d (K elements):

    "peft"     A (r, in/groups, k₁, …, k_d) and B (out, r): a convolution to r channels, then a 1×…×1 one; the
               rank of ΔW, as an (out, in/groups·K) matrix, is at most r.
    "loralib"  A (r·k_d, in·k_d) and B (out/groups·K/k_d, r·k_d): ΔW = (B A).view(weight.shape), as loralib's
               checkpoints have it.  The view mixes output and kernel axes, so its rank may be r·k_d².
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.lora.layer import DEFAULT, Adapter, LoRALayer, Product, full_precision


class _ConvNd(LoRALayer):
    """`nn.ConvNd` with a low-rank update of its kernel.

    Args:
        in_channels, out_channels, kernel_size: as in `nn.ConvNd`; the kernel may be a tuple.
        r, lora_alpha, lora_dropout, merge_weights, use_rslora, use_dora: as in `Linear`.
        init_lora_weights: True (A kaiming-uniform, B zeros), "gaussian" (A from N(0, 1/r²)) or False (both random).
        layout: "loralib" (the default: its checkpoints load) or "peft" (what `adapt` uses).
        **kwargs: `stride`, `padding`, `dilation`, `groups`, `bias`, `padding_mode`, `device`, `dtype`.

    Raises:
        ValueError: for a negative r, an unknown layout, or an `init_lora_weights` that isn't meant for convolutions.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    _conv: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        layout: str = "loralib",
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[call-arg]
        self.merge_weights = merge_weights
        adapter = self.make_adapter(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            layout=layout,
        )
        if r > 0:
            self._register(DEFAULT, adapter)
        else:
            self._asked_for = adapter
        self.reset_parameters()  # a second time, as loralib does: the same seed gives the same layer

    def make_adapter(self, **given: Any) -> Adapter:
        if given.get("layout", "peft") not in ("peft", "loralib"):
            raise ValueError(f"layout={given['layout']!r}: must be loralib or peft")
        adapter = Adapter(**given)
        adapter.refuse("pissa", "olora", of="convolutions")
        return adapter

    def _shapes(self, adapter: Adapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        r, last = adapter.r, self.kernel_size[-1]
        assert isinstance(r, int)
        if adapter.layout == "peft":
            return (r, self.in_channels // self.groups, *self.kernel_size), (self.out_channels, r)
        rest = math.prod(self.kernel_size[:-1])
        return (r * last, self.in_channels * last), (self.out_channels // self.groups * rest, r * last)

    def _initialise(self, adapter_name: str) -> None:
        adapter = self.adapters[adapter_name]
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        if adapter.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1 / adapter.r)  # type: ignore[operator]
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        if adapter.init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(lora_B)

    def _base(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self._conv_forward(input, weight, bias)  # type: ignore[operator]
        return output

    def _adapted(self, input: Tensor) -> Tensor:
        """One convolution with W + ΔW, as in loralib, where that is the same function."""
        active = self.active_adapters
        adapters = [self.adapters[name] for name in active]
        if any(a.use_dora or a.layout == "peft" for a in adapters) or any(map(self._dropout_p, active)):
            return super()._adapted(input)
        weight = self.weight
        for name, share in active.items():
            weight = weight + share * self._delta(name, weight.dtype)
        return self._base(input, weight, self._cast_bias())

    def _update(self, input: Tensor, adapter_name: str) -> Tensor:
        adapter = self.adapters[adapter_name]
        input = F.dropout(input, self._dropout_p(adapter_name))
        if adapter.layout == "loralib":
            return self._base(input, self._delta(adapter_name, input.dtype), None)
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        # Every group of channels has the same A: (r·groups) thin channels, r of them for each group's outputs.
        repeated = lora_A.repeat(self.groups, *[1] * (lora_A.ndim - 1))
        thin = self._base(input, repeated.to(input.dtype), None)
        pointwise = lora_B.view(*lora_B.shape, *[1] * len(self.kernel_size))
        update: Tensor = type(self)._conv(thin, pointwise.to(input.dtype), groups=self.groups) * adapter.scaling
        return update

    def _delta(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        product = lora_B.to(dtype) @ lora_A.to(dtype).flatten(1)
        delta: Tensor = product.view(self.weight.shape) * self.adapters[adapter_name].scaling
        return delta

    def delta_weight(self, adapter_name: str = DEFAULT) -> Tensor:
        """ΔW, of the weight's shape, in fp32 (fp64 for fp64 parameters)."""
        dtype = torch.promote_types(self.lora_tensor("lora_A", adapter_name).dtype, torch.float32)
        with full_precision(self.weight.device):
            return self._delta(adapter_name, dtype)

    @torch.no_grad()
    def product(self, adapter_name: str = DEFAULT) -> Product:
        """ΔW, as an (out, in/groups·K) matrix = scaling · B @ A.

        Raises:
            ValueError: for loralib's layout, whose ΔW has no such form.
        """
        if self.adapters[adapter_name].layout == "loralib":
            raise ValueError(
                "a convolution in loralib's layout has no PEFT form (its ΔW isn't of rank r): use layout='peft'"
            )
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        return Product(lora_A.detach().flatten(1), lora_B.detach(), self.adapters[adapter_name].scaling)

    def _along_outputs(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * len(self.kernel_size))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """loralib wraps its convolution: `conv.weight` and `conv.bias` are ours."""
        for name in ("weight", "bias"):
            if f"{prefix}conv.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}conv.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(_ConvNd, nn.Conv1d):
    __doc__ = (_ConvNd.__doc__ or "").replace("ConvNd", "Conv1d")
    _plain_type = nn.Conv1d
    _conv = F.conv1d


class Conv2d(_ConvNd, nn.Conv2d):
    __doc__ = (_ConvNd.__doc__ or "").replace("ConvNd", "Conv2d")
    _plain_type = nn.Conv2d
    _conv = F.conv2d


class Conv3d(_ConvNd, nn.Conv3d):
    __doc__ = (_ConvNd.__doc__ or "").replace("ConvNd", "Conv3d")
    _plain_type = nn.Conv3d
    _conv = F.conv3d
