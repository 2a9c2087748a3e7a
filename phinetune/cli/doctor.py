"""`phinetune doctor`"""

import json
from typing import Any


def run_doctor(training: bool, as_json: bool) -> None:
    from phinetune.cli.quiet import quiet_libraries

    quiet_libraries()
    from phinetune.measure.doctor import examine

    found = examine(training)
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    from phinetune.measure.doctor import KERNELS

    cpu, memory, gflops = found["cpu"], found["memory_gb"], found["gflops"]
    made = [
        f"{', '.join(words for name, words in KERNELS.items() if name in names)} in {dtype}"
        for dtype, names in found["kernels"].items()
        if names
    ]
    on_gpu = found["gpu_memory_gb"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    lines = [
        f"versions      {versions}; Python {found['python']}, {found['system']}",
        f"processor     {cpu['name']}, {cpu['cores']} cores; {' '.join(cpu['instructions']) or 'plain instructions'}",
        f"device        {found['device']}; {found['threads']}",
        f"memory        {memory['free']:.1f} GB free of {memory['total']:.1f}; freed memory is "
        f"{'kept and used again' if found['freed_memory_is_kept'] else 'given back to the system'}"
        + (f"; on the GPU {on_gpu['free']:.1f} GB free of {on_gpu['total']:.1f}" if on_gpu else ""),
        f"C++ kernels   {'; '.join(made) + ', by ' + found['kernels_in'] if made else _why_no_kernels(found)}",
        f"products      {', '.join(f'{name} {rate:,.0f}' for name, rate in gflops.items())} G(FL)OP/s; "
        f"dtype auto is {found['dtype']}",
    ]
    if training := found.get("training"):
        lines.append(
            f"training      {training['model']}: {training['tokens_per_second']:,.0f} tokens/s in "
            f"{training['peak_gb']:.2f} GB; {training['gflops']:,.0f} of {training['gflops_of_its_products']:,.0f} "
            f"GFLOP/s that its own products reach: {training['share_of_rate']:.0%}"
        )
    return lines


def _why_no_kernels(found: dict[str, Any]) -> str:
    if found["device"] != "cpu":
        return "none: they are for CPUs"
    if found["kernels_in"] is None:
        return "none: they need AVX512-BF16 or AVX2, which this processor hasn't; plain products are used"
    if not found["compiler"]:
        return "none: there is no C++ compiler (install g++ or clang++)"
    return "none: they couldn't be compiled, or PHINETUNE_COMPILE=0 is set"
