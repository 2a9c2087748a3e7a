"""Products in panels against float64, whatever this CPU can multiply by itself."""

import pytest
import torch
from conftest import relative_error

from phinetune.kernels import products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["torch", "panels", "C++"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (0, 5, 4), (5, 0, 4), (5, 3, 7), (3, 70, 40), (300, 70, 250), (130, 4000, 97), (16, 512, 700)]
)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_products_and_sums(monkeypatch, dtype, by, shape, transposed):
    check_products(monkeypatch, dtype, by, shape, transposed)


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_products_by_several_threads(monkeypatch, transposed, threads):
    check_products(monkeypatch, torch.bfloat16, "C++", (300, 70, 250), transposed)


def check_products(monkeypatch, dtype, by, shape, transposed):
    monkeypatch.setattr(products, "_is_left_to_us", lambda a: by != "torch")
    if by == "panels":
        monkeypatch.setattr(products.native, "library", lambda name: None)
    if by == "C++" and (dtype is not torch.bfloat16 or products.native.library("products") is None):
        pytest.skip("no C++ product here")
    monkeypatch.setattr(products, "PANEL_BYTES", 100_000)
    torch.manual_seed(0)
    m, k, n = shape
    a = torch.randn(k, m, dtype=dtype).T if transposed[0] else torch.randn(m, k, dtype=dtype)
    b = torch.randn(n, k, dtype=dtype).T if transposed[1] else torch.randn(k, n, dtype=dtype)
    bias, y = torch.randn(n, dtype=dtype), torch.randn(m, n, dtype=dtype)
    exact, tolerance = a.double() @ b.double(), {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    if 0 in shape:
        assert torch.equal(products.product(a, b).double(), exact)
        return
    assert relative_error(products.product(a, b), exact) < tolerance
    assert relative_error(products.product(a, b, bias), exact + bias.double()) < tolerance
    expected = y.double() + 0.3 * exact
    wider = torch.zeros(m, n + 4, dtype=dtype)
    wider[:, 2:-2] = y
    products.add_product_(wider[:, 2:-2], a, b, 0.3)
    assert relative_error(wider[:, 2:-2], expected) < tolerance
    assert not wider[:, :2].any()
    assert not wider[:, -2:].any()
