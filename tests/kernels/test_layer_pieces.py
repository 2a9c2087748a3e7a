"""Norm, gated activation and rotation against float64 by torch's own autograd, as they are and compiled."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from phinetune.kernels import compiled, gated, norm, rotary


@pytest.fixture(params=["eager", "compiled"], autouse=True)
def either_way(request, monkeypatch):
    """Compiled whatever the size, or never."""
    monkeypatch.setattr(compiled, "SMALLEST", 1 if request.param == "compiled" else 1 << 60)


DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def drawn(*shape, dtype):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@torch.no_grad()
def test_rms_norm_and_its_gradient(dtype, tolerance):
    torch.manual_seed(0)
    x, weight, dy = drawn(7, 33, dtype=dtype) * 3, drawn(33, dtype=dtype), drawn(7, 33, dtype=dtype)
    with torch.enable_grad():
        exact = x.double().requires_grad_()
        reference = F.rms_norm(exact, (33,), weight.double(), 1e-5)
        reference.backward(dy.double())
    y, rstd = norm.rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype and rstd.dtype == torch.float32
    assert relative_error(y, reference) < tolerance
    assert torch.equal(norm.rms_norm_again(x, weight, rstd), y)
    assert relative_error(norm.rms_norm_backward(dy, x, weight, rstd), exact.grad) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@torch.no_grad()
def test_silu_mul_and_its_gradient(dtype, tolerance):
    torch.manual_seed(0)
    both, dy = drawn(5, 42, dtype=dtype) * 2, drawn(5, 21, dtype=dtype)
    with torch.enable_grad():
        exact = both.double().requires_grad_()
        gate, up = exact.chunk(2, -1)
        reference = F.silu(gate) * up
        reference.backward(dy.double())
    assert relative_error(gated.silu_mul(*both.chunk(2, -1)), reference) < tolerance
    gradient, again = gated.silu_mul_backward(dy, *both.chunk(2, -1))
    assert relative_error(gradient, exact.grad) < tolerance
    assert relative_error(again, reference) < tolerance


@pytest.mark.parametrize("rotated", [8, 6], ids=["whole heads", "part of them"])
@torch.no_grad()
def test_rotation_is_transformers_and_its_gradient_the_rotation_back(rotated):
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    torch.manual_seed(0)
    x = torch.randn(5, 7, 8)  # 4 query heads, 2 key heads, a value head
    angles = torch.rand(5, rotated // 2).repeat(1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    q, k = apply_rotary_pos_emb(x[:, :4].transpose(0, 1)[None], x[:, 4:6].transpose(0, 1)[None], cos[None], sin[None])
    reference = torch.cat([q[0].transpose(0, 1), k[0].transpose(0, 1), x[:, 6:]], 1)
    turned = rotary.rotate(x, cos, sin, 6)
    assert relative_error(turned, reference) < 1e-6
    assert relative_error(rotary.rotate_backward(turned, cos, sin, 6), x) < 1e-6
    dy = torch.randn_like(x)
    with torch.enable_grad():
        exact = x.double().requires_grad_()
        rotary.rotate(exact, cos.double(), sin.double(), 6).backward(dy.double())
    assert relative_error(rotary.rotate_backward(dy, cos, sin, 6), exact.grad) < 1e-6
    parts = dy[:, :4], dy[:, 4:6], dy[:, 6:]
    assert relative_error(rotary.rotate_backward_side_by_side(*parts, cos, sin), exact.grad) < 1e-6
