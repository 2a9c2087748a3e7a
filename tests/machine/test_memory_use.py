"""What counts as a run's memory, of processes that hold it by themselves."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from phinetune.machine import memory
from phinetune.machine.memory import MemoryPeak, memory_in_use

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere children aren't counted")

MB = 10**6
LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # a file that is on no tmpfs, whose pages are shared
HELD = {
    "anonymous": f"held = b'x' * {200 * MB}",
    "shared": f"held = mmap.mmap(-1, {200 * MB}); held.write(b'x' * {200 * MB})",
    "mapped": f"file = open({str(LIBRARY)!r}); held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); held[::4096]",
}


@pytest.mark.parametrize(("kind", "counted"), [("anonymous", 200), ("shared", 200), ("mapped", 0)])
def test_memory_is_anonymous_and_shared_pages_of_a_process_and_all_below_it(kind, counted):
    assert LIBRARY.stat().st_size > 200 * MB
    code = f"import mmap, sys; {HELD[kind]}; print('held', flush=True); sys.stdin.read()"
    through_a_shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code]  # a child of a child
    before = memory_in_use() / MB
    with MemoryPeak() as peak:
        with subprocess.Popen(through_a_shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"held\n"
            held = memory_in_use() / MB
            time.sleep(0.5)  # ten looks at it
            child.stdin.close()
        assert counted - 10 < held - before < counted + 50, "an interpreter takes some 10 MB"
        assert memory_in_use() / MB < before + 50
        assert 1000 * peak.gb > before + counted - 10, "what it was in between"


@pytest.mark.parametrize("lives_on", [True, False], ids=["a child that lives on", "one that has just been forked"])
def test_a_fork_isnt_its_parent_again(lives_on, monkeypatch):
    """Until it becomes another program, or writes, a forked child's pages are its parent's."""
    child, samples, plain = 2**30, itertools.count(), memory._anonymous_and_shared
    monkeypatch.setattr(memory, "INTERVAL", 0.01)
    monkeypatch.setattr(memory, "_children", lambda: [child if lives_on else child + next(samples)])
    monkeypatch.setattr(memory, "_anonymous_and_shared", lambda pid: 10**15 if pid >= child else plain(pid))
    with MemoryPeak() as peak:
        time.sleep(0.3)
    assert (peak.gb > 10**5) == lives_on


def test_where_the_parts_arent_told_the_whole_counts(monkeypatch):
    """gVisor's status has VmRSS alone; a process may bear a name that is cut in the midst of a letter."""
    told = "Name:\tобучени\ufffd\nVmSize:\t 9000 kB\nVmRSS:\t 2000 kB\n"
    monkeypatch.setattr(memory, "_read", lambda path: told)
    assert memory._anonymous_and_shared(1) == 2000 * 1024
    parts = "RssAnon:\t 700 kB\nRssFile:\t 900 kB\nRssShmem:\t 30 kB\n"
    monkeypatch.setattr(memory, "_read", lambda path: told + parts)
    assert memory._anonymous_and_shared(1) == 730 * 1024


def test_off_linux_what_this_process_takes_isnt_free(monkeypatch):
    monkeypatch.setattr(memory, "_read", lambda path: "")
    monkeypatch.setattr(memory, "_containers", lambda: iter(()))
    monkeypatch.setattr(memory, "memory_in_use", lambda: 3 * 10**9)
    monkeypatch.setattr(memory, "memory_total", lambda: 16 * 10**9)
    assert memory.memory_free() == 13 * 10**9
