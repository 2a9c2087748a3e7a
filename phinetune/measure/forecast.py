"""What a run will need, before it starts: memory by its parts, time, disk; and what to change where it doesn't fit.

Memory and time are straight lines in the number of decoder layers.  So the run's own parts (its model, its longest
rows, its rehearsal, some of its steps) are measured with few layers and with more, each in a process of its own, and
the lines are read at the model's number.  A model that doesn't fit here can be planned for in a minute:

    peak  ┤                            ○   read at 32 layers
          ┤                 ·
          ┤      ●  measured with 4
          ┤  ●      measured with 2
          └──┴───┴─────────────────────┴── layers
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from phinetune.data import Plan, Prepared, prepare
from phinetune.errors import InputError, PhinetuneError, RecipeError, RunError
from phinetune.kernels import native
from phinetune.kernels.allocator import keep_freed_memory
from phinetune.kernels.threads import settle_threads
from phinetune.machine.disk import free_bytes
from phinetune.machine.memory import MemoryPeak, memory_free, memory_in_use, memory_total
from phinetune.model import adapt_model, load_config, load_tokenizer, pick_device
from phinetune.model.memory import mapped_bytes
from phinetune.recipe import PeftConfig, Recipe, dump_recipe, load_recipe
from phinetune.train.best import Best
from phinetune.train.checkpoint import MINIMUM_KEPT, checkpoint_bytes, most_at_once
from phinetune.train.finetune import largest_batch, make_loop
from phinetune.train.loop import Loop
from phinetune.train.optimiser import trainable_parameters
from phinetune.train.rehearsal import longest_rows, rehearse
from phinetune.train.schedule import Schedule
from phinetune.train.signals import listening

# Memory (10⁹ bytes) and dense products in the dtype that `auto` is there (FLOP a second), by NVIDIA's data sheets.
BEFORE_AMPERE = ("t4",)  # which doesn't multiply bfloat16
GPUS = {
    "t4": (16, 8.1e12), "l4": (24, 121e12), "a10": (24, 125e12), "rtx3090": (24, 71e12), "rtx4090": (24, 165e12),
    "a100-40": (40, 312e12), "a100-80": (80, 312e12), "h100": (80, 989e12), "h200": (141, 989e12),
}  # fmt: skip
SHARE_ON_A_GPU = 0.36  # of that rate: Phi-3-mini on an H200, flat batches of 6,000 tokens (docs/benchmarks.md)
CONTEXT = 0.6e9  # what CUDA takes for itself; assumed, not measured
FEW_MEASURED = 2  # layers of the smaller measurement: one is off the line, as its peak is the head's
MEASURED_BYTES, MOST_MEASURED = 1 << 30, 16  # of the larger measurement, and its layers
TIMED_STEPS, MOST_PASSES, TIMED_SECONDS = 4, 3, 6.0
BFLOAT16, INT8, NF4 = 2.0, 1.0, 0.52  # bytes of a weight; NF4's with its scales


@dataclass(frozen=True)
class Needs:
    """What a run with some number of layers takes: bytes, and seconds for a token that is trained on."""

    process: float
    loaded: float
    parameters: float
    """How many are frozen."""
    weights: float
    """Their bytes."""
    mapped: float
    """Of the weights: read from their file as they are wanted, and not counted in the peak."""
    trained: float
    stepping: float
    """The peak of its steps."""
    rehearsed: float
    """What is in use behind its rehearsal, freed memory that is kept among it: answers, a layer merged."""
    checkpoint: float
    seconds: float

    @property
    def peak(self) -> float:
        return max(self.stepping, self.rehearsed)

    def with_layers(self, here: int, other: "Needs", there: int, layers: int) -> "Needs":
        """On the line through this, of `here` layers, and `other`, of `there`; what is rehearsed beside steps grows
        with the loaded model alone."""
        share = (layers - here) / max(there - here, 1)
        mine, its = asdict(self), asdict(other)
        line = Needs(**{name: mine[name] + (its[name] - mine[name]) * share for name in mine})
        return replace(line, rehearsed=other.rehearsed + line.loaded - other.loaded)


class Room(NamedTuple):
    """Bytes."""

    free: float
    """All that must lie in memory, mapped weights among it."""
    most: float
    """What a run is to stay below (`max_memory_gb`), which is counted as its peak is: without mapped weights."""

    def holds(self, needs: Needs) -> bool:
        return needs.peak + needs.mapped <= self.free and needs.peak <= self.most


def forecast(recipe: Recipe, device: str | None = None) -> dict[str, Any]:
    """All that `phinetune plan` says.

    Args:
        device: a GPU of `GPUS`, or this processor with other memory, such as `16GB`; this machine by default.

    Raises:
        PhinetuneError: what is wrong with the recipe, its data, its model or the device.
    """
    training = recipe.training_config
    free, rate = _device(device, training.use_cpu)
    on_cpu = rate is None and pick_device(training.use_cpu).type == "cpu"
    if rate is not None and recipe.model_kwargs.dtype == "auto":  # what it is there, whatever is faster here
        dtype = "float32" if str(device).lower() in BEFORE_AMPERE else "bfloat16"
        recipe = recipe.derived("model_kwargs", "dtype", dtype, "the GPU, for auto")
    if recipe.data.train == "-":
        raise RecipeError("data.train", "is standard input, which can be read once only", "give a file")
    tokenizer = load_tokenizer(recipe.model, recipe.model_kwargs, recipe.tokenizer_kwargs)
    data = prepare(recipe.data, tokenizer, training.seed_of_rows)
    steps = Plan(data.train.lengths, training.seed_of_rows, training, recipe.data.max_length, data.weights)
    tokens = int(data.train.lengths[steps.rows_from(0)].sum())
    config = load_config(recipe.model, recipe.model_kwargs)
    lines = _Lines(recipe, config)
    layers = lines.layers
    room = Room(free, math.inf if training.max_memory_gb is None else training.max_memory_gb * 1e9)
    recomputed = _recomputed(recipe, lines, room, on_gpu=rate is not None)
    needs = lines.at(recomputed)
    if rate is not None:
        needs = _on_gpu(needs, rate, recomputed / layers)
    best = Best.of(training)
    kept = most_at_once(Schedule.of(training, steps).saves_behind(0, best), training.save_total_limit, best.keeps)
    batch = largest_batch(data.train.lengths, steps.most_tokens, recipe.data.max_batch_tokens)
    found = {
        "model": recipe.model,
        "device": device or pick_device(training.use_cpu).type,
        "share_of_gpu_rate": SHARE_ON_A_GPU if rate is not None else None,
        "merges_for_answers": bool(recipe.evaluation.metrics) and not (recipe.model_kwargs.load_in_8bit and on_cpu),
        "measured_with_layers": [lines.few, lines.more],
        "layers": layers,
        "recomputed_layers": recomputed,
        "batch_tokens": batch.tokens,
        "longest_row": batch.longest,
        "gb": {name: round(size / 1e9, 3) for name, size in _parts(needs, lines, recomputed).items()},
        "mapped_gb": round(needs.mapped / 1e9, 3),
        "peak_gb": round(needs.peak / 1e9, 3),
        "free_gb": round(min(room) / 1e9, 3),
        "fits": room.holds(needs),
        "steps": len(steps),
        "tokens": tokens,
        "seconds_a_step": round(needs.seconds * tokens / len(steps), 3),
        "seconds": round(needs.seconds * tokens, 1),
        "disk_gb": round((kept * needs.checkpoint + needs.checkpoint / 4) / 1e9, 3),
        "disk_free_gb": round(free_bytes(Path(training.output_dir)) / 1e9, 3),
    }
    in_layers = needs.parameters - lines.all(bool(recomputed), 0).parameters
    return {**found, "advice": _advice(recipe, found, needs, in_layers, batch.longest)}


class _Lines:
    """What is measured, when it is first asked for: layers that keep what their gradients need, or are recomputed.

    Where a recipe adapts some of the layers by their numbers, the few that are measured are all adapted, and what
    trains is counted in the whole model.  Time and activations are of a run that adapts all, no less than its own.
    """

    def __init__(self, recipe: Recipe, config: Any) -> None:
        sizes = config.get_text_config()  # of the language model, where it is one of several
        self.recipe, self.layers = recipe, int(sizes.num_hidden_layers)
        layer = 24 * int(sizes.hidden_size) ** 2  # bytes: some 12 squares of it in 16 bits
        self.more = min(max(MEASURED_BYTES // layer, 3), MOST_MEASURED, self.layers)
        self.few = min(FEW_MEASURED, self.layers)
        self._measured: dict[bool, tuple[Needs, Needs]] = {}
        self._whole: Any = None  # without weights
        if recipe.peft_config.layers_to_transform is not None or _names_with_numbers(recipe.peft_config):
            self._whole, peft = _adapted_by_number(recipe, config)
            self.recipe = recipe.model_copy(update={"peft_config": peft})

    def ends(self, recomputed: bool) -> tuple[Needs, Needs]:
        if recomputed not in self._measured:
            few, more = (_in_a_process(self.recipe, count, recomputed) for count in (self.few, self.more))
            self._measured[recomputed] = few, more
        return self._measured[recomputed]

    def all(self, recomputed: bool, layers: int | None = None) -> Needs:
        few, more = self.ends(recomputed)
        line = few.with_layers(self.few, more, self.more, self.layers if layers is None else layers)
        if self._whole is None or layers is not None:
            return line
        trained = _bytes_of(trainable_parameters(self._whole).values())
        further = trained - line.trained
        return replace(
            line,
            trained=trained,
            loaded=line.loaded + further,
            stepping=line.stepping + 4 * further,  # gradients and two moments beside it
            rehearsed=line.rehearsed + further,
            checkpoint=checkpoint_bytes(self._whole),
        )

    def at(self, recomputed: int) -> Needs:
        """With so many of the layers recomputed: between both lines."""
        if recomputed in (0, self.layers):
            return self.all(bool(recomputed))
        kept, made, share = asdict(self.all(False)), asdict(self.all(True)), recomputed / self.layers
        return Needs(**{name: kept[name] + (made[name] - kept[name]) * share for name in kept})

    def activations(self, recomputed: int) -> float:
        """Bytes that all layers keep: what grows with their number, without their weights and what trains."""
        needs, none = self.at(recomputed), self.all(bool(recomputed), 0)
        return (needs.stepping - none.stepping) - (needs.loaded - none.loaded) - 12 / 4 * (needs.trained - none.trained)


def _names_with_numbers(peft: PeftConfig) -> list[str]:
    """Names of modules, and patterns, that may mean a layer by its number."""
    given = (peft.target_modules, peft.exclude_modules, peft.rank_pattern, peft.alpha_pattern, peft.modules_to_save)
    names = [name for some in given for name in ([some] if isinstance(some, str) else some or ())]
    return [name for name in names if re.search(r"\d", name)]


def _adapted_by_number(recipe: Recipe, config: Any) -> tuple[Any, PeftConfig]:
    """The whole model, adapted, without weights; and what adapts each of a few layers as some of all are.

    Raises:
        RecipeError: as the run would.
    """
    from transformers import AutoModelForCausalLM

    peft = recipe.peft_config
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    adapted = adapt_model(whole, peft, recipe.training_config.seed)
    update: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}
    if numbered := _names_with_numbers(peft):
        update |= {"target_modules": sorted({name.rpartition(".")[2] for name in adapted}), "exclude_modules": None}
        update |= {"rank_pattern": {}, "alpha_pattern": {}}
        update["modules_to_save"] = [name for name in peft.modules_to_save or () if name not in numbered] or None
    return whole, peft.model_copy(update=update)


def _recomputed(recipe: Recipe, lines: _Lines, room: Room, on_gpu: bool) -> int:
    """How many layers are recomputed: as the recipe says, or the fewest that make the run fit."""
    training = recipe.training_config
    if training.gradient_checkpointing:
        return lines.layers
    if training.gradient_checkpointing_layers != "auto":
        return min(training.gradient_checkpointing_layers, lines.layers)
    counts = range(lines.layers + 1)
    return next((n for n in counts if room.holds(_moved(lines.at(n)) if on_gpu else lines.at(n))), lines.layers)


def _moved(needs: Needs) -> Needs:
    """To a GPU: weights that are mapped here lie in its memory, and the process in this machine's."""
    taken = needs.peak + needs.mapped - needs.process + CONTEXT
    return replace(needs, process=CONTEXT, stepping=taken, rehearsed=0.0, mapped=0.0)


def _on_gpu(needs: Needs, rate: float, recomputed: float) -> Needs:
    """Memory as it is measured here, time by the device's rate: 4 FLOP a weight and token, 2 more where recomputed."""
    flop = (4 + 2 * recomputed) * needs.parameters
    return replace(_moved(needs), seconds=flop / (rate * SHARE_ON_A_GPU))


def _parts(needs: Needs, lines: _Lines, recomputed: int) -> dict[str, float]:
    """The peak, bytes by bytes."""
    parts = {
        "process": needs.process,
        "weights": needs.weights - needs.mapped,
        "adapters": needs.trained,
        "gradients": needs.trained,
        "optimizer": 2 * needs.trained,
        "activations": max(lines.activations(recomputed), 0.0),
    }
    return {**parts, "head and working memory": max(needs.peak - sum(parts.values()), 0.0)}


def _advice(recipe: Recipe, found: dict[str, Any], needs: Needs, in_layers: float, longest: int) -> list[str]:
    """What to change, the mildest first; nothing where the run fits.

    Args:
        in_layers: parameters of the decoder layers, which 8 and 4 bits are for.
    """
    advice = []
    training, kwargs = recipe.training_config, recipe.model_kwargs
    if found["disk_gb"] > found["disk_free_gb"]:
        if training.save_total_limit is None or training.save_total_limit > MINIMUM_KEPT:
            advice.append(f"training_config.save_total_limit={MINIMUM_KEPT}: only the newest checkpoints are kept")
        advice.append("training_config.output_dir=… on a disk with more room")
    if found["fits"]:
        return advice
    is_plain, element = not (kwargs.load_in_8bit or kwargs.load_in_4bit), needs.weights / needs.parameters
    if is_plain and element > 3:  # float32
        less = needs.weights - BFLOAT16 * needs.parameters
        advice.append(f"model_kwargs.dtype=bfloat16: about {less / 1e9:.1f} GB less")
    if found["batch_tokens"] > longest:
        advice.append(f"data.max_batch_tokens={longest}: the same update in smaller flat batches")
    if training.max_memory_gb is not None:
        advice.append("a higher training_config.max_memory_gb")
    if found["recomputed_layers"] < found["layers"]:
        advice.append("training_config.gradient_checkpointing=true: layers keep their input alone")
    if is_plain and element >= BFLOAT16:  # else it comes in few bits
        by_int8, by_nf4 = (in_layers * (element - kept) / 1e9 for kept in (INT8, NF4))
        advice.append(f"model_kwargs.load_in_8bit=true: about {by_int8:.1f} GB less")
        advice.append(f"model_kwargs.load_in_4bit=true: about {by_nf4:.1f} GB less, by bitsandbytes")
    advice.append(f"data.max_length={max(longest // 2, 128)}: rows that are longer are left out, and listed")
    return [*advice, "a smaller model"]


def _device(name: str | None, use_cpu: bool) -> tuple[float, float | None]:
    """(bytes that can be had, a GPU's rate by its name)"""
    if name is None:
        here = pick_device(use_cpu)
        there = memory_free(here) + memory_in_use(here)
        return there if here.type == "cuda" else min(there, memory_total()), None  # off Linux that is free, in use too
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", name, re.IGNORECASE):
        return float(match[1]) * 1e9, None
    if name.lower() not in GPUS:
        raise RecipeError(f"--device {name}", "is not known", f"name one of {', '.join(GPUS)}, or memory such as 16GB")
    memory, rate = GPUS[name.lower()]
    return memory * 1e9, rate


def _in_a_process(recipe: Recipe, layers: int, recomputed: bool) -> Needs:
    """`measure`, where nothing was allocated before."""
    with tempfile.TemporaryDirectory(prefix="phinetune-plan-") as folder:
        changed = {"output_dir": str(Path(folder) / "run"), "gradient_checkpointing": recomputed, "disable_tqdm": True}
        changed |= {} if recomputed else {"gradient_checkpointing_layers": 0}
        training = recipe.training_config.model_copy(update=changed)
        path = Path(folder) / "recipe.yaml"
        asked = recipe.model_copy(update={"training_config": training})
        path.write_text(dump_recipe(asked), encoding="utf-8")
        command = [sys.executable, "-m", "phinetune.measure.forecast", str(path), str(layers)]
        token = recipe.model_kwargs.token  # is in no recipe that is written
        environment = {**os.environ, **({"HF_TOKEN": token} if token else {})}
        lives, alive = os.pipe()
        try:
            ran = subprocess.run(command, stdin=lives, capture_output=True, text=True, check=False, env=environment)
        finally:
            os.close(lives)
            os.close(alive)
    lines, said = ran.stdout.strip().splitlines(), [line for line in ran.stderr.splitlines() if line.strip()]
    if ran.returncode != 0 or not lines:
        reason = said[-1].removeprefix("error: ") if said else f"it ended with {ran.returncode}"
        kind = InputError if ran.returncode == InputError.exit_code else RunError
        raise kind(f"plan, measured with {layers} layers", reason)
    return Needs(**json.loads(lines[-1]))


def measure(recipe: Recipe, layers: int) -> Needs:
    """A run with so many layers, timed and rehearsed, in this process."""
    keep_freed_memory()
    settle_threads()
    device = pick_device(recipe.training_config.use_cpu)
    native.prepare(device)
    with listening() as signals:
        tokenizer = load_tokenizer(recipe.model, recipe.model_kwargs, recipe.tokenizer_kwargs)
        data = prepare(recipe.data, tokenizer, recipe.training_config.seed_of_rows)
        process = memory_in_use(device)
        loop = make_loop(recipe, tokenizer, data, signals, layers=layers)
        loaded = memory_in_use(device)
        loop.folder.mkdir(parents=True)
        loop.model.train()
        loop.update(longest_rows(data.train, loop.largest_batch.tokens), learning_rate=0.0)
        with MemoryPeak(device) as memory:  # the compiler isn't in it
            if device.type == "cuda":  # a processor keeps freed memory, so the longest rows' is in it there
                loop.update(longest_rows(data.train, loop.largest_batch.tokens), learning_rate=0.0)
            seconds = _seconds_a_token(loop, data)
            stepping = memory.gb * 1e9
        with MemoryPeak(device) as memory:
            rehearse(loop, tokenizer, data)
            rehearsed = memory.gb * 1e9 if device.type == "cuda" else memory_in_use(device)
    frozen = [parameter for parameter in loop.model.parameters() if not parameter.requires_grad]
    return Needs(
        process=process,
        loaded=loaded,
        parameters=sum(parameter.numel() for parameter in frozen),
        weights=_bytes_of(frozen),
        mapped=mapped_bytes(loop.model),
        trained=_bytes_of(trainable_parameters(loop.model).values()),
        stepping=stepping,
        rehearsed=rehearsed,
        checkpoint=checkpoint_bytes(loop.model),
        seconds=seconds,
    )


def _bytes_of(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _seconds_a_token(loop: Loop, data: Prepared) -> float:
    """Of some of the run's own steps, the fastest of a few passes: what disturbed one isn't the run's."""
    numbers = sorted({int(n) for n in np.linspace(0, len(loop.steps) - 1, TIMED_STEPS)})
    fastest = dict.fromkeys(numbers, float("inf"))
    tokens = sum(int(data.train.lengths[loop.steps[number]].sum()) for number in numbers)
    begin = time.perf_counter()
    for passed in range(MOST_PASSES):
        for number in numbers:
            rows = [data.train[row] for row in loop.steps[number]]
            start = time.perf_counter()
            loop.update(rows, learning_rate=0.0)
            fastest[number] = min(fastest[number], time.perf_counter() - start)
        if time.perf_counter() - begin > TIMED_SECONDS * (passed + 1) / MOST_PASSES:
            break
    return sum(fastest.values()) / tokens


def main() -> None:
    """`python -m phinetune.measure.forecast RECIPE LAYERS`: one measurement, as JSON."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        print(json.dumps(asdict(measure(load_recipe(sys.argv[1])[0], int(sys.argv[2])))))
    except PhinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """Standard input ends when whoever asked for the measurement is gone, killed too."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
