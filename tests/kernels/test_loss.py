"""The chunked loss against cross-entropy over full logits in float64."""

import pytest
import torch
from conftest import relative_error

from phinetune.kernels import loss


def test_a_real_vocabulary_loses_no_more_digits_than_plain_cross_entropy():
    torch.manual_seed(0)
    weight, targets = torch.randn(49152, 64), torch.randint(0, 49152, (40,))
    hidden = torch.randn(40, 64) * 0.5 + 0.4 * weight[targets]  # likely targets: 1 - p, and so the gradient, is small
    values, gradients = [], []
    for function in (loss.linear_cross_entropy_sum, loss.linear_cross_entropy_sum_reference):
        x = hidden.clone().requires_grad_()
        value = function(x, weight, targets)
        value.backward()
        values.append(value.detach())
        gradients.append(x.grad)
    exact = hidden.double().requires_grad_()
    reference = torch.nn.functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    reference.backward()
    ours, plain = (relative_error(value, reference.detach()) for value in values)
    assert ours <= 1.5 * plain + 1e-7
    ours, plain = (relative_error(gradient, exact.grad) for gradient in gradients)
    assert ours <= 1.5 * plain + 1e-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_loss_and_gradient(monkeypatch, dtype, tolerance, tokens):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 50 * 9)  # nine tokens a chunk
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 12).to(dtype).requires_grad_()
    weight, targets = torch.randn(50, 12).to(dtype), torch.randint(0, 50, (tokens,))
    value = loss.linear_cross_entropy_sum(hidden, weight, targets)
    (value / tokens).backward()

    exact = hidden.detach().double().requires_grad_()
    reference = torch.nn.functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    (reference / tokens).backward()
    assert value.dtype == torch.float32
    assert relative_error(value.detach(), reference.detach()) < tolerance
    assert relative_error(hidden.grad, exact.grad) < tolerance
    with torch.no_grad():
        assert torch.equal(loss.linear_cross_entropy_sum(hidden, weight, targets), value)
    plain = loss.linear_cross_entropy_sum_reference(hidden, weight, targets)
    assert relative_error(plain.detach(), reference.detach()) < tolerance
