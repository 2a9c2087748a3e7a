"""C++ kernels (the folder cpp/), compiled for this machine by its own compiler when they are first needed.

A kernel is used where the machine has the instructions that it is written in and a compiler; elsewhere its caller goes
another way, which computes the same.  What is compiled is kept in phinetune's cache folder, under a digest of the
source, the compiler and the processor.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from phinetune.files import cache_folder, mark_used, remove_unused

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w"]
KERNELS = ("attention", "decoder", "loss", "products")
IN_FLOAT32 = ("attention",)  # are for float32, too, where products are in it anyway
INSTRUCTIONS = {"avx512_bf16": 2, "avx2": 4}  # the best first; bytes of an element as products in them read it
OWN_NAME = re.compile(r"\w+-[0-9a-f]{16}\.(so|sha256)|tmp\w+")  # what lies in the cache's folder
log = logging.getLogger(__name__)
_calls = threading.Lock()


def library(name: str, dtype: torch.dtype = torch.bfloat16) -> ctypes.CDLL | None:
    """The functions of cpp/NAME.cpp for tensors of a dtype; None where there are none, or where this machine can't run
    or compile them (said once, at warning level, where only the compiler is wanting)."""
    return _library(name, dtype)


@functools.cache
def _library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    if not may_compile() or not _is_for(name, dtype):
        return None
    compiler = find_compiler()
    if not compiler:
        log.warning(f"no C++ compiler (g++, clang++), so the kernel {name!r} isn't used, which makes training slower")
        return None
    try:
        made = _compile(name, dtype, compiler)
    except _CannotCompile as error:
        log.warning(f"{compiler[0]} doesn't make the kernel {name!r} ({error}): training is slower")
        return None
    except OSError as error:
        _say_no_folder(f"{cache_folder() / 'kernels'} can't be written ({error.strerror or error})")
        return None
    try:
        found = ctypes.CDLL(str(made))
    except OSError as error:  # a volume without leave to execute, say
        _say_no_folder(f"{made} can't be loaded ({error})")
        return None
    found.was_refused.restype = ctypes.c_bool
    return found


@functools.cache
def _say_no_folder(what: str) -> None:
    """Once for all kernels."""
    log.warning(f"{what}, so C++ kernels aren't used, which makes training slower: set PHINETUNE_CACHE")


def prepare(device: torch.device) -> None:
    """Compiles what isn't yet and computes on this device: best before a model is loaded, since a compiler started
    later is a process as large as this one for a moment."""
    if device.type == "cpu":
        for dtype in (torch.bfloat16, torch.float32):
            kernels_for(dtype)


def kernels_for(dtype: torch.dtype) -> list[str]:
    """Those of `KERNELS` that compute with tensors of a dtype on this CPU."""
    return [name for name in KERNELS if library(name, dtype) is not None]


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is numbers of a dtype in this machine's memory: a subclass's may lie nowhere."""
    return type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu" and tensor.dtype is dtype


def call(name: str, function: str, *arguments: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    """A function of a library that is there: tensors go by their address, None as null, the rest as it is.

    Raises:
        MemoryError: if the system refused it memory: then it computed nothing.
    """
    found = library(name, dtype)
    assert found is not None, f"{name} isn't compiled for {dtype}"
    with _calls:  # whose memory was refused is asked of the library
        getattr(found, function)(*map(_as_c, arguments))
        refused = found.was_refused()
    if refused:
        raise MemoryError(f"{function} was refused memory")


def _as_c(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return argument


def may_compile() -> bool:
    """Not where PHINETUNE_COMPILE is 0: nothing is compiled then, in C++ or by torch's compiler."""
    return os.environ.get("PHINETUNE_COMPILE", "1") != "0"


def find_compiler() -> list[str]:
    """The command that compiles C++: `CXX` where it is set, else g++ or clang++; empty where there is none."""
    asked = os.environ.get("CXX")
    if not asked:
        return [found] if (found := shutil.which("g++") or shutil.which("clang++")) else []
    try:
        return shlex.split(asked)
    except ValueError:  # a quote that isn't closed: it is no command, which is said where it is run
        return [asked]


def instructions() -> str | None:
    """Of `INSTRUCTIONS`, those that kernels use: the best that this processor has and the compiler can write."""
    there = [name for name in INSTRUCTIONS if getattr(torch.cpu, f"_is_{name}_supported", bool)()]
    return next((name for name in there if _are_written(name)), there[0] if there else None)


@functools.cache
def _are_written(name: str) -> bool:
    """Not by a compiler that is older than the processor: GCC 9 doesn't know AVX512-BF16."""
    compiler = find_compiler()
    if not compiler or not may_compile():
        return True
    try:
        _run([*compiler, f"-m{name.replace('_', '')}", "-E", "-x", "c++", os.devnull])
    except _CannotCompile:
        return False
    return True


def element_bytes() -> int:
    """Of a weight as it is laid out for products."""
    return INSTRUCTIONS[instructions() or next(iter(INSTRUCTIONS))]


def _is_for(name: str, dtype: torch.dtype) -> bool:
    if dtype is torch.float32:
        return name in IN_FLOAT32 and instructions() == "avx2"
    if dtype is not torch.bfloat16 or instructions() is None:
        return False
    return name != "products" or is_emulated(dtype)


@functools.cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU's products of a dtype are left to torch's element-wise loops, oneDNN having none, or not being
    there, as in torch for Macs."""
    if not torch.backends.mkldnn.is_available():
        return dtype in (torch.bfloat16, torch.float16)
    if dtype is torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


class _CannotCompile(Exception):
    """What the compiler says, in a line."""


def _compile(name: str, dtype: torch.dtype, compiler: list[str]) -> Path:
    """The library's file, from the cache or made now.

    Raises:
        _CannotCompile: if the compiler doesn't make it.
        OSError: if it can't be kept.
    """
    files = sorted(SOURCES.glob("*.h")) + [SOURCES / f"{name}.cpp"]
    flags = [*FLAGS, f"-DPRODUCTS_IN_{(instructions() or '').upper()}"]
    if dtype is torch.float32:
        flags.append("-DSTORED=float")
    made_of = [
        *flags,
        *compiler,
        _version(*compiler),
        _processor(),
        *(file.read_text(encoding="utf-8") for file in files),
    ]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    made = folder / f"{name}-{digest}.so"
    if _is_whole(made):
        mark_used(made)
        mark_used(_of_contents(made))
        return made
    folder.mkdir(parents=True, exist_ok=True)
    remove_unused(folder, OWN_NAME)
    with tempfile.TemporaryDirectory(dir=folder) as working:  # renamed when whole: others may be at it, too
        unfinished = Path(working) / made.name
        command = [*compiler, *flags, str(files[-1]), "-o", str(unfinished)]
        _run(command)
        own = Path(working) / _of_contents(made).name
        own.write_text(hashlib.sha256(unfinished.read_bytes()).hexdigest(), encoding="utf-8")
        unfinished.replace(made)
        own.replace(_of_contents(made))
    return made


def _of_contents(made: Path) -> Path:
    return made.with_suffix(".sha256")


def _is_whole(made: Path) -> bool:
    """Whether it is what was compiled: to load what was cut short, when the power went, say, ends the process."""
    try:
        return hashlib.sha256(made.read_bytes()).hexdigest().encode() == _of_contents(made).read_bytes()
    except OSError:
        return False


@functools.cache
def _version(*compiler: str) -> str:
    return _run([*compiler, "--version"])


def _run(command: list[str]) -> str:
    """What it prints. Raises _CannotCompile."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        errors = [line for line in said if "error" in line.lower()] or said  # before it stands where it was included
        raise _CannotCompile(errors[0] if errors else str(error)) from None


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model name", "cpu family"))))
