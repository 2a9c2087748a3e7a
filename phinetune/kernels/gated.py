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


@compiled
def silu_mul_backward(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """([d gate | d up] (T, 2F), silu(gate) · up (T, F)): the activation is made again, in the same pass."""
    precise = torch.promote_types(gate_TF.dtype, torch.float32)
    gate, up, dy = gate_TF.to(precise), up_TF.to(precise), dy_TF.to(precise)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    both = torch.cat([dgate.to(dy_TF.dtype), (dy * silu).to(dy_TF.dtype)], -1)
    return both, silu.to(dy_TF.dtype) * up_TF
