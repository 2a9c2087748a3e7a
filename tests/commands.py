"""The command line in processes of its own, forked from one that has imported what they import: 2 s in place of 5.

That one never computes, so a fork of it is like a process that has just started.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

IMPORTED = Path(__file__).parents[1] / "benchmarks" / "reliability" / "imported.py"  # what they import
_context = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """The process that they are forked from. It takes its modules' folder from the environment alone, and goes on
    without a word where it doesn't find one."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(IMPORTED.parent), before]))
    _context.set_forkserver_preload([IMPORTED.stem])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def phinetune(*arguments: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
    """What `python -m phinetune ARGUMENTS` says and exits with; options as `forked` takes them."""
    return forked(command_line, "phinetune", *arguments, **options)


def forked(target: Callable[..., object], *arguments: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
    return Forked(target, *arguments, **options).wait()


class Forked:
    """`target(*arguments)`, of a module that can be imported, in a process of its own that goes on.

    Args:
        input: what it reads from standard input.
        cwd: the folder it runs in.
        env: variables over the environment's, for what reads them behind the imports.
    """

    def __init__(
        self,
        target: Callable[..., object],
        *arguments: Any,
        input: str = "",
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.arguments = [*map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory(prefix="phinetune-test-")
        self._said = Path(self._folder.name)
        (self._said / "0").write_text(input, encoding="utf-8")
        environment = {**os.environ, **(env or {})}
        _start_server()
        given = (target, self.arguments, self._said, cwd or Path.cwd(), environment)
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float = 300) -> "subprocess.CompletedProcess[str]":
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"{self.arguments} took more than {seconds:g} s: {self._text(2)[-2000:]}")
        said = subprocess.CompletedProcess(self.arguments, self._process.exitcode, self._text(1), self._text(2))
        self._folder.cleanup()
        return said

    def poll(self) -> int | None:
        return self._process.exitcode

    def _text(self, descriptor: int) -> str:
        return (self._said / str(descriptor)).read_text(encoding="utf-8")


def command_line(*arguments: str) -> None:
    from phinetune.cli import main

    sys.argv = [*arguments]
    main()


def run_code(file: str) -> None:
    """A Python file, as a script."""
    exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"), {"__name__": "__main__"})


def _run(
    target: Callable[..., object], arguments: list[str], said: Path, cwd: Path, environment: dict[str, str]
) -> None:
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT), (2, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(said / str(descriptor), flags, 0o600), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # it ends with the process
    assert IMPORTED.stem in sys.modules, "nothing was imported beforehand"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    target(*arguments)
