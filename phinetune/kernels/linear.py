"""A frozen linear layer's two products, whatever its weight is kept as: a plain tensor, or int8.

Shape suffixes: T tokens, K inputs, N outputs.
"""

from torch import Tensor

from phinetune.kernels import int8
from phinetune.kernels.products import add_product_, product


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ bias), (T, N) in x's dtype; written into `out` (some columns of a matrix, say) where one is given."""
    if isinstance(weight_NK, int8.Int8Weight):
        y_TN = int8.linear(x_TK, weight_NK, bias_N)
        return y_TN if out is None else out.copy_(y_TN)
    return product(x_TK, weight_NK.T, bias_N, out)


def input_gradient(dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    """dy W, (T, K)."""
    if isinstance(weight_NK, int8.Int8Weight):
        return int8.input_gradient(dy_TN, weight_NK)
    return product(dy_TN, weight_NK)


def add_input_gradient_(dx_TK: Tensor, dy_TN: Tensor, weight_NK: Tensor) -> Tensor:
    """dx += dy W, in place."""
    if isinstance(weight_NK, int8.Int8Weight):
        return dx_TK.add_(int8.input_gradient(dy_TN, weight_NK))
    return add_product_(dx_TK, dy_TN, weight_NK)
