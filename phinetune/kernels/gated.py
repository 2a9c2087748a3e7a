"""The gated activation of Llama's and Phi-3's MLPs, SwiGLU (Shazeer, 2020): silu(gate) · up.

Shape suffixes: T tokens, F width of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phinetune.kernels.compiled import compiled


@compiled
def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up, (T, F); silu in fp32, rounded before it is multiplied, as transformers' layers do."""
    precise = torch.promote_types(gate_TF.dtype, torch.float32)
    return F.silu(gate_TF.to(precise)).to(gate_TF.dtype) * up_TF


def silu_mul_backward(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """([d gate | d up] (T, 2F), silu(gate) · up (T, F)): the activation is made again, in the same pass."""
    if dy_TF.device.type == "cpu":
        return _side_by_side(dy_TF, gate_TF, up_TF)
    # A GPU's kernel that joins them computes both for each of their elements: twice as long as copying them.
    dgate, dup, activated = compiled(_of_each)(dy_TF, gate_TF, up_TF)
    return torch.cat([dgate, dup], -1), activated


@compiled
def _side_by_side(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup, activated = _of_each(dy_TF, gate_TF, up_TF)
    return torch.cat([dgate, dup], -1), activated


def _of_each(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d gate, d up, silu(gate) · up)"""
    precise = torch.promote_types(gate_TF.dtype, torch.float32)
    gate, up, dy = gate_TF.to(precise), up_TF.to(precise), dy_TF.to(precise)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return dgate.to(dy_TF.dtype), (dy * silu).to(dy_TF.dtype), silu.to(dy_TF.dtype) * up_TF
