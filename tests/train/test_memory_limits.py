"""Memory that the system refuses (RLIMIT_DATA): smaller flat batches, the same rows, the same update."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's"),
]

# A whole run of SmolLM2, one step of 8 rows in one flat batch, to which so many MB more are allowed behind its loading.
RUN = """
import resource, sys
from pathlib import Path
import phinetune
from phinetune.train import finetune
output, dtype, megabytes, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
real = finetune.make_loop

def make_loop(*given, **named):
    loop = real(*given, **named)
    for rows in loop.steps[0][:1]:  # what is made once is there
        loop.update([loop.train[rows]], 0.0)
    loop.optimizer.state.clear()
    if megabytes:
        used = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (used + (megabytes << 20), resource.RLIM_INFINITY))
    return loop

finetune.make_loop = make_loop
rows = [[{"role": "user", "content": f"Count from {i}."},
         {"role": "assistant", "content": " ".join(map(str, range(i, i + 100)))}] for i in range(111, 911, 100)]
phinetune.finetune(
    model="smollm2", train=[{"messages": row} for row in rows], rehearsal=False,
    data={"max_batch_tokens": tokens}, model_kwargs={"dtype": dtype},
    peft_config={"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]},
    training_config={"output_dir": output, "max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True,
                     "learning_rate": 1e-3, "disable_tqdm": True, "optim": "adamw_torch"},
)
"""


def run(output, dtype, megabytes=0, tokens=4096):
    command = [sys.executable, "-c", RUN, str(output), dtype, str(megabytes), str(tokens)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )


def moments(output):
    """AdamW's first moment behind one step: a tenth of the step's clipped gradients."""
    tensors = load_file(output / "checkpoint-1" / "optimizer.safetensors")
    return torch.cat([t.flatten() for name, t in sorted(tensors.items()) if name.endswith(".exp_avg")]).double()


@pytest.mark.parametrize(("dtype", "megabytes"), [("float32", 700), ("bfloat16", 200)])
def test_flat_batches_are_halved(tmp_path, dtype, megabytes):
    limited, free, as_small = tmp_path / "limited", tmp_path / "free", tmp_path / "as small"
    ran = run(limited, dtype, megabytes)
    assert ran.returncode == 0, ran.stderr
    log = (limited / "train.log").read_text()
    assert "memory was refused for a flat batch of" in log
    assert "the same rows a step" in log
    fitted = json.loads((limited / "checkpoint-1" / "state.json").read_text())["max_batch_tokens"]
    assert fitted < 4096, "a resumed run begins with what fitted"
    assert run(as_small, dtype, tokens=fitted).returncode == 0
    assert torch.equal(moments(limited), moments(as_small)), "nothing is left of what was refused"
    if dtype == "float32":
        assert run(free, dtype).returncode == 0
        assert (moments(limited) - moments(free)).norm() / moments(free).norm() < 1e-5


def test_a_row_that_does_not_fit_is_an_error(tmp_path):
    ran = run(tmp_path / "run", "bfloat16", 20)
    assert ran.returncode == 1
    assert "doesn't fit into memory" in ran.stderr
    assert "lower data.max_length" in ran.stderr
