"""Elementwise pieces compiled by torch's own compiler, so that a chain of them is one pass over memory.

A norm, an activation or a softmax written in plain torch is a handful of passes, each as long as memory takes, and
together they cost as much as the matrix products of a CPU.  What is decorated with `@compiled` stays a plain function
of tensors, which is the reference: small tensors, and machines without a compiler (C++ for a CPU, Triton for a GPU),
run it as it is.
"""

import functools
import logging
import os
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from phinetune.kernels.native import find_compiler, may_compile

Function = TypeVar("Function", bound=Callable[..., Any])
log = logging.getLogger(__name__)

SMALLEST = 1 << 17  # elements of the first tensor: below it a pass takes less than the call of a compiled function
MOST_VERSIONS = 64  # of one function in one process: for dtypes, and for sizes that can't be symbolic (1, say)


def compiled(function: Function) -> Function:
    """Compiles a pure function of tensors, whose first argument is the largest, when it is first worth it.

    Sizes are symbolic: another number of tokens compiles nothing.  On a GPU those of tokens alone are, which come
    first, since a division by a symbolic width takes longer there than the pass (docs/log.md).  What is compiled has no
    gradient, so it is for the inside of autograd functions: where gradients are recorded the function runs as it is.
    """

    @functools.wraps(function)
    def call(first: Tensor, *more: Any) -> Any:
        as_it_is = first.numel() < SMALLEST or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if as_it_is or not can_compile(first.device.type) or not _is_computed_in(first):
            return function(first, *more)
        made = _compile(function, first.device.type)
        return made(*(_as_input(a) if isinstance(a, Tensor) else a for a in (first, *more)))

    return call  # type: ignore[return-value]


@functools.cache
def _compile(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VERSIONS)
    if device != "cuda":
        return torch.compile(function, dynamic=True, fullgraph=True)
    # Where a GPU splits a sum, torch's compiler warns that it can't take a softmax's maximum in the same pass.
    return torch.compile(function, dynamic=False, fullgraph=True, options={"online_softmax": False})


def _is_computed_in(tensor: Tensor) -> bool:
    """Whether Triton computes in its dtype: on a GPU before Ampere it refuses bfloat16."""
    return not tensor.is_cuda or tensor.dtype is not torch.bfloat16 or gpu_has_bfloat16()


@functools.cache
def gpu_has_bfloat16() -> bool:
    """Whether torch's current GPU multiplies bfloat16; those before Ampere don't, and torch does without them."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _as_input(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_cuda and tensor.ndim > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # goes before `dynamic=False`
    return tensor


@functools.cache
def can_compile(device: str = "cpu") -> bool:
    """Whether there is a compiler for this kind of device that makes something, and it may be used."""
    if not may_compile():
        return False
    if device == "cpu" and not find_compiler():
        log.warning("no C++ compiler (g++, clang++): elementwise passes aren't fused, which makes training slower")
        return False
    if device == "cpu":  # where Triton is there, torch would start a process a core, which are for GPUs
        os.environ.setdefault("TORCH_WARM_POOL", "0")
    try:
        with warnings.catch_warnings():  # torch's compiler warns of torch's own deprecations while it is imported
            warnings.simplefilter("ignore")
            torch.compile(torch.neg, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if device == "cpu" and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            first = "it needs Python.h, which Debian and Ubuntu have in the package python3-dev"
        log.warning(f"torch.compile doesn't work here ({first}): training is slower")
        return False
    return True
