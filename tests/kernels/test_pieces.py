import gc
import subprocess
import sys
import threading

import pytest
import torch

from phinetune.kernels.pieces import LEAST, empty_rows, release_idle

LIKE = torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_idle():
    release_idle()
    yield
    release_idle()


def test_a_tensor_that_is_gone_leaves_its_memory_to_the_next():
    first = empty_rows(LIKE, 1000, 700)
    where = first.data_ptr()
    del first
    shorter = empty_rows(LIKE, 900, 700)
    assert shorter.data_ptr() == where
    assert (shorter.shape, shorter.dtype, shorter.is_contiguous()) == ((900, 700), torch.bfloat16, True)


def test_what_is_held_in_any_way_isnt_given_to_another():
    x = torch.randn(1000, 64, requires_grad=True)
    made = [empty_rows(x, 1000, 64).copy_(x.detach() * i) for i in range(4)]
    kept = made[1][3:5]  # a view
    product = (x * made[2]).sum()  # saved for a gradient
    expected = made[2].clone()
    del made
    gc.collect()
    others = [empty_rows(x, 1000, 64).fill_(float("nan")) for _ in range(8)]
    assert len({other.data_ptr() for other in others}) == 8
    product.backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(kept, x.detach()[3:5])


def test_rows_of_all_lengths_and_dtypes_of_one_width_hold_what_is_written():
    held = []
    for number, rows in enumerate((2000, 1, 3000, 17, 1500, 3001, 40)):
        for dtype, width in ((torch.bfloat16, 128), (torch.float32, 64), (torch.bool, 256)):
            held.append((number % 2, empty_rows(LIKE, rows, width, dtype=dtype).fill_(number % 2)))
        if number == 2:
            del held[3:6]
            held[0] = held[-1]
    assert all(bool((tensor == value).all()) for value, tensor in held)


def test_a_tensor_is_no_view_and_is_saved_with_its_own_bytes_alone(tmp_path):
    tensor = empty_rows(LIKE, 1000, 64).zero_()
    assert tensor._base is None
    tensor.add_(1)
    torch.save(tensor, tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_size < 1000 * 64 * 2 + 5000
    assert torch.equal(torch.load(tmp_path / "t.pt", weights_only=True), tensor)


def test_small_tensors_and_other_devices_go_the_usual_way():
    assert empty_rows(torch.empty(0, device="meta"), 4096, 64).device.type == "meta"
    small = empty_rows(LIKE, LEAST // 128 - 1, 64)
    assert small.shape == (LEAST // 128 - 1, 64)
    assert empty_rows(LIKE, 0, 64).shape == (0, 64)


def test_threads_get_pieces_of_their_own():
    wrong = []

    def work(number: int) -> None:
        for i in range(300):
            mine = [empty_rows(LIKE, 600 + i, 64, dtype=torch.float32).fill_(number) for _ in range(3)]
            if not all(bool((tensor == number).all()) for tensor in mine):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


BATCHES = """
import random, torch
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.kernels.pieces import empty_rows
keep_freed_memory()
like, draw, most = torch.empty(0, dtype=torch.bfloat16), random.Random(0), 0
for _ in range(12):  # batches: what layers keep, with what each works with in between
    rows, kept = draw.randint(900, 1024), []
    for layer in range(30):
        for width in (576, 960, 3072):
            kept.append(empty_rows(like, rows, width).zero_())
            empty_rows(like, rows, width + 64).zero_()
    while kept:
        kept.pop()
        empty_rows(like, rows, 640).zero_()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["RssAnon"].split()[0]) / 1000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_batches_take_little_more_than_what_the_largest_one_keeps():
    def anonymous(script: str) -> float:
        return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

    kept = 30 * 1024 * (576 + 960 + 3072) * 2 / 1e6  # MB
    without = anonymous(BATCHES.replace("range(12)", "range(0)"))
    assert kept * 0.9 < anonymous(BATCHES) - without < kept * 1.1
