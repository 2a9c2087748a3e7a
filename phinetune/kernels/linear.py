"""A frozen linear layer's two products, whatever its weight is kept as: a plain tensor, or a quantised one.

Shape suffixes: T tokens, K inputs, N outputs.
"""

from torch import Tensor

from phinetune.kernels.products import add_product_, product
from phinetune.kernels.quantised import QuantisedWeight


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ bias), (T, N) in x's dtype; written into `out` (some columns of a matrix, say) where one is given."""
    if isinstance(weight_NK, QuantisedWeight):
        y_TN = weight_NK.linear(x_TK, bias_N)
        return y_TN if out is None else out.copy_(y_TN)
    return product(x_TK, weight_NK.T, bias_N, out)


def add_linear_(y_TN: Tensor, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """y += x Wᵀ, in place, each sum rounded once (but see `QuantisedWeight.add_linear_`)."""
    if isinstance(weight_NK, QuantisedWeight):
        return weight_NK.add_linear_(y_TN, x_TK)
    return add_product_(y_TN, x_TK, weight_NK.T)


def input_gradient(dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    """dy W, (T, K)."""
    if isinstance(weight_NK, QuantisedWeight):
        return weight_NK.input_gradient(dy_TN)
    return product(dy_TN, weight_NK)


def add_input_gradient_(dx_TK: Tensor, dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    """dx += dy W, in place, as `add_linear_`."""
    if isinstance(weight_NK, QuantisedWeight):
        return weight_NK.add_input_gradient_(dx_TK, dy_TN)
    return add_product_(dx_TK, dy_TN, weight_NK)
