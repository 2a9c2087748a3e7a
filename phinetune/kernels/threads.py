"""How many threads torch computes with on a CPU.

torch takes as many as the machine has cores. In a container that may use a few of them, those threads wait for each
other's turn and everything takes several times as long, so the number is held to what this process may use.
"""

import os

import torch

from phinetune.machine.cores import cores_to_run_on, share_of_container


def settle_threads() -> str:
    """Lowers torch's number of threads where this process may use fewer cores; returns the number and why, in words."""
    threads = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name):
            return f"{threads} threads ({name} says so)"
    cores = cores_to_run_on()
    share = share_of_container()
    allowed, why = min((cores, "of the cores that this process may use"), (share, "of its container's share"))
    if allowed < threads:
        torch.set_num_threads(allowed)
        return f"{allowed} threads ({why}; torch would have taken {threads})"
    return f"{threads} threads (of {cores} cores)"
