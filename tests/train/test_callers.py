"""What a run leaves of its caller's process: everything as it found it."""

import logging
import os
import signal

import torch

import phinetune

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(8)
]


def state():
    logger = logging.getLogger("phinetune")
    return {
        "drawn": torch.random.get_rng_state().tolist(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "log": (logger.level, logger.propagate, list(logger.handlers)),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        # torch's compiler writes two of its own.
        "environment": {n: v for n, v in os.environ.items() if "PYTEST" not in n and "TORCHINDUCTOR" not in n},
        "folder": os.getcwd(),  # noqa: PTH109
    }


def test_a_run_leaves_its_caller_as_it_was(tmp_path, tiny_llama_folder):
    torch.manual_seed(7)
    before = state()
    for number in range(2):
        phinetune.finetune(
            model=str(tiny_llama_folder),
            train=ROWS,
            training_config={"output_dir": str(tmp_path / f"run-{number}"), "max_steps": 2, "use_cpu": True},
        )
        assert state() == before
