"""Frozen weights as bitsandbytes keeps them, on a CPU as on CUDA, dequantised for each product.

    4 bits  W[i] ≈ absmax[i // blocksize] · table[code[i]]
    8 bits  W[n, k] ≈ absmax[n] · code[n, k] / 127

4 bits are QLoRA's: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), the NormalFloat table in
section 3, and double quantisation, by which the scales of the blocks are kept in 8 bits themselves.  8 bits are the
weights of LLM.int8() (Dettmers et al., 2022); activations are left as they are, so there are no outliers to look after.
bitsandbytes quantises and dequantises: the numbers are those of its own layers.

Shape suffixes: T tokens, K inputs, N outputs; a weight is (N, K) as in `nn.Linear`.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.products import add_product_, product
from phinetune.kernels.quantised import QuantisedWeight


class DequantisedForProducts(QuantisedWeight):
    """What both kinds have in common. `compute_dtype` is that of the products; what comes out has the dtype of what
    went in."""

    NAME: ClassVar[str]
    compute_dtype: torch.dtype

    def linear(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and (x_TK.requires_grad or (bias_N is not None and bias_N.requires_grad)):
            return cast(Tensor, _Linear.apply(x_TK, self, bias_N))
        bias_N = None if bias_N is None else bias_N.to(self.compute_dtype)
        return product(x_TK.to(self.compute_dtype), self.dequantise(self.compute_dtype).T, bias_N).to(x_TK.dtype)

    def input_gradient(self, dy_TN: Tensor) -> Tensor:
        return product(dy_TN.to(self.compute_dtype), self.dequantise(self.compute_dtype)).to(dy_TN.dtype)

    def add_linear_(self, y_TN: Tensor, x_TK: Tensor) -> Tensor:
        if x_TK.dtype != self.compute_dtype:  # y isn't rounded to that; the product is rounded by itself first
            return y_TN.add_(self.linear(x_TK))
        return add_product_(y_TN, x_TK, self.dequantise(self.compute_dtype).T)

    def add_input_gradient_(self, dx_TK: Tensor, dy_TN: Tensor) -> Tensor:
        if dy_TN.dtype != self.compute_dtype:
            return dx_TK.add_(self.input_gradient(dy_TN))
        return add_product_(dx_TK, dy_TN, self.dequantise(self.compute_dtype))

    def cast(self, plain_NK: Tensor) -> Any:
        """Quantising again would change the numbers, in silence."""
        raise RuntimeError(f"{self.NAME} has its dtype for good: load the model in another, or dequantise it")


class FourBitWeight(DequantisedForProducts):
    """A frozen weight as bitsandbytes' packed `codes` and the tensors of its `QuantState`."""

    NAME = "a 4-bit weight"
    KIND = "4 bits, by bitsandbytes"
    PARTS = ("codes", "absmax", "table", "absmax2", "table2", "offset")
    SETTINGS = ("blocksize", "blocksize2", "dtype2", "quant_type", "compute_dtype")
    codes: Tensor
    absmax: Tensor
    table: Tensor
    absmax2: Tensor | None
    table2: Tensor | None
    offset: Tensor | None
    blocksize: int
    blocksize2: int
    dtype2: torch.dtype | None
    quant_type: str

    @staticmethod
    def __new__(cls, codes: Tensor, state: Any, compute_dtype: torch.dtype) -> "FourBitWeight":
        inner = state.state2
        kept = {
            "codes": codes,
            "absmax": state.absmax,
            "table": state.code,
            "absmax2": inner.absmax if inner else None,
            "table2": inner.code if inner else None,
            "offset": state.offset if inner else None,
            "blocksize": state.blocksize,
            "blocksize2": inner.blocksize if inner else 0,
            "dtype2": inner.dtype if inner else None,
            "quant_type": state.quant_type,
            "compute_dtype": compute_dtype,
        }
        return cast(FourBitWeight, QuantisedWeight.wrap(cls, kept, torch.Size(state.shape), state.dtype))

    @property
    def state(self) -> Any:
        """bitsandbytes' own description of it."""
        from bitsandbytes.functional import QuantState

        inner = None
        if self.absmax2 is not None:
            inner = QuantState(self.absmax2, blocksize=self.blocksize2, code=self.table2, dtype=self.dtype2)
        return QuantState(
            self.absmax,
            shape=self.shape,
            code=self.table,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.offset,
            state2=inner,
        )

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rounded to the weight's own dtype, as bitsandbytes does it, and then cast: one weight, whoever asks."""
        from bitsandbytes.functional import dequantize_4bit

        plain: Tensor = dequantize_4bit(self.codes, self.state)
        return plain.view(self.shape).to(dtype or self.dtype)

    def quantised_alike(self, plain_NK: Tensor) -> "FourBitWeight":
        return quantise_4bit(
            plain_NK, self.quant_type, self.absmax2 is not None, self.compute_dtype, blocksize=self.blocksize
        )


def quantise_4bit(
    weight_NK: Tensor,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    blocksize: int = 64,
) -> FourBitWeight:
    """A weight (N, K) in 4 bits, by bitsandbytes.

    Args:
        quant_type: nf4 or fp4.
        double_quant: keeps the scales of the blocks in 8 bits too.
        compute_dtype: of the products; the weight's own by default.
        blocksize: elements that share a scale.
    """
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight_NK.detach().contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )
    return FourBitWeight(codes, state, compute_dtype or weight_NK.dtype)


class EightBitWeight(DequantisedForProducts):
    """A frozen weight as bitsandbytes' `codes` (N, K) in int8 and the largest number of each row, `absmax` (N,)."""

    NAME = "an 8-bit weight"
    KIND = "8 bits, by bitsandbytes"
    PARTS = ("codes", "absmax")
    SETTINGS = ("compute_dtype",)
    codes: Tensor
    absmax: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> "EightBitWeight":
        kept = {"codes": codes, "absmax": absmax, "compute_dtype": dtype}
        return cast(EightBitWeight, QuantisedWeight.wrap(cls, kept, codes.shape, dtype))

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        plain: Tensor = int8_vectorwise_dequant(self.codes, self.absmax[:, None])
        return plain.to(self.dtype).to(dtype or self.dtype)

    def quantised_alike(self, plain_NK: Tensor) -> "EightBitWeight":
        return quantise_8bit(plain_NK)


def quantise_8bit(weight_NK: Tensor) -> EightBitWeight:
    """A weight (N, K) in 8 bits, by bitsandbytes, which takes it in float16."""
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, absmax, _ = int8_vectorwise_quant(weight_NK.detach().half().contiguous())
    return EightBitWeight(codes, absmax, weight_NK.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight: DequantisedForProducts, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return weight.linear(x_TK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        dx_TK = weight.input_gradient(dy_TN) if need_x else None
        return dx_TK, None, dy_TN.sum(0, dtype=ctx.bias_dtype) if need_bias else None
