"""Each setting of a recipe changes what it is for.

A case is a setting, another value of it, and what is seen of two whole runs that differ in it alone: with the default
(`was` where there is none that a small run could take) and with that value.  The runs are real: a small random model,
SmolLM2's chat template and the beginning of its vocabulary, three steps on twelve rows.  Of Hugging Face's libraries
only what is fetched is made up.  Cases that ask for the same recipe share its run.

`see` must differ, and be what the pair `gives` says.  `same` must not differ.  The weights must begin to differ in step
`since` (0: as they are drawn); where a setting isn't to change them, they may be `unmoved` apart, as a share of what
has been learnt.
"""

import io
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import transformers
from conftest import tiny_model
from safetensors.torch import load_file

from phinetune.errors import PhinetuneError, RunError
from phinetune.layers.fast import FastLayer
from phinetune.lora import LoRALayer, lora_layers
from phinetune.model import quantised_layers
from phinetune.model.memory import decoder_layers
from phinetune.recipe import DataSource, Recipe, make_recipe
from phinetune.recipe.schema import Section
from phinetune.train import train
from phinetune.train.loop import Loop
from phinetune.train.optimiser import trainable_parameters

# What is in the files that runs read


def chat(*said: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(said)]}


CHATS = [chat(f"What is {i} plus {i * 3 % 17}?", f"{i + i * 3 % 17}." + " Indeed." * (i % 5)) for i in range(12)]
OTHERS = [chat(f"Spell {word}.", ", ".join(word)) for word in ("one", "two", "three", "four", "five")]
FILES = {
    "chats": CHATS,
    "others": OTHERS,
    "turns": [chat("1?", "One.", "And 2?", "Two, it is.") for _ in range(4)],
    "doubled": [*CHATS[:4], *CHATS[:2]],
    "disorderly": [*CHATS[:4], {"messages": [{"role": "assistant", "content": "Hello."}, *CHATS[4]["messages"]]}],
    "with_empty": [*CHATS[:4], chat("", "What?")],
    "broken": [*CHATS[:4], {"nothing": 1}],
    "both": [{**row, "text": "Once upon a time."} for row in CHATS[:4]],
    "pairs": [{"frage": "Wie viel?", "antwort": "Drei."} for _ in range(4)],
    "thoughts": [chat("1?", "<think>Hm</think>One.", "2?", "<think>Oh</think>Two.")],
    "told": [chat("1?", "One.", system="Count.")],
}

# Chat templates: SmolLM2's without its own system message, and what some models' do beside it
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_SYSTEM = PLAIN.replace("in messages", "in messages if m['role'] != 'system'")
WITHOUT_THOUGHTS = PLAIN.replace(
    "m['content'] +", "(m['content'] if loop.last else m['content'].split('</think>')[-1]) +"
)
WITH_DATE = "{{ strftime_now('%d.%m.%Y') }}" + PLAIN
WITH_VARIABLE = "{% if loudly %}{{ 'LOUD ' }}{% endif %}" + PLAIN

VOCABULARY = 2048
HUB_MODEL, HUB_DATA = "owner/tiny", "owner/numbers"
BASE = {
    "model": "../llama",
    "model_kwargs.dtype": "float32",  # `auto` depends on the machine
    "data.train": "../chats.jsonl",
    "training_config.max_steps": 3,
    "training_config.use_cpu": True,
    "training_config.disable_tqdm": True,
    "peft_config.r": 4,
    "peft_config.lora_dropout": 0.0,
}


# What is seen of a run


@dataclass
class Step:
    """One update, as the optimiser sees it."""

    rates: list[float]  # of each parameter group
    norm: float  # of the gradient it is given
    weights: dict[str, torch.Tensor]  # behind it


@dataclass(repr=False)
class Seen:
    """A run: what it wrote, and what came by at its borders."""

    root: Path  # where it ran
    error: PhinetuneError | None = None
    loop: Any = None
    rows: list[list[int]] = field(default_factory=list)  # of the training data
    drawn: dict[str, torch.Tensor] = field(default_factory=dict)  # weights before step 1
    steps: list[Step] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)  # forward passes of each decoder layer in training
    batches: list[int] = field(default_factory=list)  # tokens of each flat batch in training
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)  # what transformers was asked for, by its class
    data_sets: list[dict[str, Any]] = field(default_factory=list)  # what `datasets` was asked for
    generated: list[tuple[int, int]] = field(default_factory=list)  # (prompts, new tokens) of each generation
    processes: int = 0
    tokenizer: Any = None
    screen: str = ""

    @property
    def folder(self) -> Path:
        return next(self.root.rglob("recipe.yaml")).parent

    @property
    def model(self) -> Any:
        return self.loop.model

    @property
    def weights(self) -> list[dict[str, torch.Tensor]]:
        """Behind each step, the fresh ones first."""
        return [self.drawn, *(step.weights for step in self.steps)]

    @cached_property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def layers(self) -> dict[str, LoRALayer]:
        return {name.removeprefix("model.layers."): layer for name, layer in lora_layers(self.model)}


def error(run: Seen) -> str:
    return str(run.error or "")


def outcome(run: Seen) -> str:
    """The first row, or why there is none."""
    return error(run) or first_row(run)


def logged(run: Seen) -> str:
    return (run.folder / "train.log").read_text()


def levels(run: Seen) -> set[str]:
    """Of the lines in train.log; each begins with a date and a time."""
    return {line.split()[2] for line in logged(run).splitlines()}


def tree(run: Seen) -> set[str]:
    """The folders that hold files."""
    return {str(path.parent.relative_to(run.root)) for path in run.root.rglob("*") if path.is_file()}


def checkpoints(run: Seen) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in run.folder.glob("checkpoint-*"))


def lines(run: Seen, key: str) -> list[int]:
    """The steps of the lines in metrics.jsonl that hold something."""
    text = (run.folder / "metrics.jsonl").read_text()
    return [line["step"] for line in map(json.loads, text.splitlines()) if key in line]


def losses_at(run: Seen) -> list[int]:
    return lines(run, "loss")


def evaluated_at(run: Seen) -> list[int]:
    return lines(run, "eval_loss")


def step_count(run: Seen) -> int:
    return run.json("summary.json")["steps"]


def rows_a_step(run: Seen) -> list[int]:
    return [len(rows) for rows in run.loop.steps]


def rows_used(run: Seen) -> int:
    return run.json("ledger.json")["train"]["used"]


def order(run: Seen) -> list[list[int]]:
    return list(run.loop.steps)


def digest(run: Seen) -> str:
    """Of the tokens in the order in which they were trained on."""
    return run.loop.counters.digest


def first_row(run: Seen) -> str:
    return run.tokenizer.decode(run.rows[0])


def learnt(run: Seen) -> list[str]:
    """What is learnt, one example after the other."""
    examples = run.loop.train
    return [run.tokenizer.decode([i for i, on in zip(e.ids, e.mask, strict=True) if on]) for e in examples]


def lengths(run: Seen) -> list[int]:
    return sorted(len(row) for row in run.rows)


def rates(run: Seen) -> list[float]:
    return [round(step.rates[0], 6 if step.rates[0] > 0.01 else 9) for step in run.steps]


def gradient_norms(run: Seen) -> list[float]:
    """As the optimiser is given them."""
    return [round(step.norm, 5) for step in run.steps]


def losses(run: Seen) -> list[float]:
    return run.loop.counters.losses


def adapted(run: Seen) -> set[str]:
    """`0.self_attn.q_proj` and so on."""
    return set(run.layers())


def scalings(run: Seen) -> set[float]:
    return {round(layer.product().scaling, 4) for layer in run.layers().values()}


def kinds_saved(run: Seen) -> set[str]:
    """The ends of the names in the adapter's file."""
    return {".".join(name.split(".")[-2:]) for name in run.adapter}


def biases_saved(run: Seen) -> set[str]:
    """The layers whose biases are in the adapter's file."""
    names = (name.replace(".base_layer", "").split(".") for name in run.adapter)
    return {name[-2] for name in names if name[-1] == "bias"}


def parameters(run: Seen) -> int:
    return sum(tensor.numel() for tensor in run.drawn.values())


def first_loss(run: Seen) -> Any:
    return pytest.approx(losses(run)[0], rel=1e-5)


def base_dtype(run: Seen) -> torch.dtype:
    return run.model.model.embed_tokens.weight.dtype


def ranks(run: Seen) -> set[int]:
    return {layer.product().lora_A.shape[0] for layer in run.layers().values()}


def apart(some: Seen, other: Seen, step: int) -> float:
    """How far the weights behind a step are, as a share of what has been learnt; infinite for other parameters."""
    a, b = some.weights[step], other.weights[step]
    if {n: t.shape for n, t in a.items()} != {n: t.shape for n, t in b.items()}:
        return math.inf
    way = {n: a[n] - some.drawn[n] for n in a} if step else a
    return norm({n: a[n] - b[n] for n in a}) / norm(way)


def kept(run: Seen) -> list[int]:
    """The step whose weights are the adapter's at the end."""
    saved = {name.removeprefix("base_model.model.").removesuffix(".weight"): t for name, t in run.adapter.items()}
    return [k for k, weights in enumerate(run.weights) if all(torch.equal(weights[n], saved[n]) for n in saved)]


def evaluations(run: Seen) -> dict[int, float]:
    """Step -> held-out loss."""
    text = (run.folder / "metrics.jsonl").read_text()
    return {line["step"]: line["eval_loss"] for line in map(json.loads, text.splitlines()) if "eval_loss" in line}


def best(run: Seen) -> int:
    return min(evaluations(run), key=evaluations(run).__getitem__)


def shrunk(run: Seen) -> float:
    """What step 1 leaves of A, which has no gradient while B is zero."""
    norms = [norm({n: t for n, t in weights.items() if n.endswith("lora_A")}) for weights in run.weights[:2]]
    return round(norms[1] / norms[0], 4)


def stride(run: Seen) -> float:
    """The mean of what step 1 adds to an element of B, in learning rates."""
    moved = [step.abs().mean() for name, step in run.steps[0].weights.items() if name.endswith("lora_B")]
    return round(float(sum(moved) / len(moved)) / run.loop.recipe.training_config.learning_rate, 1)


def begins_at_zero(run: Seen) -> bool:
    return not any(tensor.any() for name, tensor in run.drawn.items() if name.endswith("lora_B"))


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(t.double().norm().item() ** 2 for t in tensors.values()) ** 0.5


def eval_rows(run: Seen) -> int | None:
    return run.json("summary.json").get("eval_rows")


def numbers_adapted(run: Seen) -> set[str]:
    """The layers' numbers."""
    return {name[0] for name in adapted(run)}


def q_adapted(run: Seen) -> bool:
    return any("q_proj" in name for name in adapted(run))


def filled(run: Seen) -> bool:
    """Whether each step has at most 100 tokens, and would have more with the first row of the next."""
    steps = [[len(run.rows[i]) for i in step] for step in run.loop.steps]
    return all(sum(step) <= 100 < sum(step) + following[0] for step, following in itertools.pairwise(steps))


def asked(name: str) -> Callable[[Seen], Any]:
    """What transformers was asked for under a name, for the tokenizer, the configuration and the weights."""
    return lambda run: [run.loaded[kind].get(name) for kind in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM")]


def asked_of_data(run: Seen) -> tuple[Any, ...]:
    """What `datasets` was asked for, and the rows that are trained on: they say which they are."""
    (options,) = run.data_sets
    return options["name"], options["split"], options["revision"], first_row(run)


def attention(run: Seen) -> tuple[str, int]:
    """Its name, and the number of flat batches: a row each where the model can't take several."""
    return run.model.config._attn_implementation, len(run.batches)


def beginning(run: Seen) -> str:
    return first_row(run)[:10]


def prompts_at_once(run: Seen) -> list[int]:
    return [prompts for prompts, _ in run.generated]


def passes(run: Seen) -> list[int]:
    return run.passes


def in_4bit(setting: str) -> Callable[[Seen], set[Any]]:
    """What the 4-bit weights of a run say of themselves."""

    def see(run: Seen) -> set[Any]:
        weights = [layer.weight for _, layer in lora_layers(run.model)]
        return {weight.settings[setting] for weight in weights}

    return see


def optimiser(run: Seen) -> str:
    return type(run.loop.optimizer).__name__


def is_fused(run: Seen) -> bool:
    return bool(run.loop.optimizer.defaults["fused"])


def all_rates(run: Seen) -> list[float]:
    """Of step 1, one for each group of parameters."""
    return sorted(run.steps[0].rates)


def answers_to_reentrant(run: Seen) -> bool:
    """`false` is what is always done, so anything else is refused or said to be ignored."""
    return "use_reentrant" in (error(run) or logged(run))


MAY_END = (error, outcome, answers_to_reentrant)  # what is seen of runs that are refused, too


def boards(run: Seen) -> set[str]:
    """Folders of TensorBoard's."""
    return {str(path.parent.relative_to(run.root)) for path in run.root.rglob("events.out.*")}


def experiments(run: Seen) -> dict[str, set[str]]:
    """MLflow's: {project: names of its runs}"""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run.root / "runs" / "mine" / "mlruns").as_uri())
    found = [one for one in client.search_experiments() if one.name != "Default"]
    return {one.name: {r.info.run_name for r in client.search_runs([one.experiment_id])} for one in found}


def best_metric(run: Seen) -> str:
    """By which the log says that the best step was found."""
    return logged(run).rpartition("is kept: best ")[2].split()[0]


def dropout_saved(run: Seen) -> float:
    return run.json("adapter_config.json")["lora_dropout"]


def spread(run: Seen) -> bool:
    """Whether A is drawn as wide as PEFT's gaussian (1/r = 0.25), not as its usual uniform (1/√(3·64) = 0.07)."""
    return run.drawn["model.layers.0.self_attn.q_proj.lora_A"].std().item() > 0.15


def base_said(run: Seen) -> list[str]:
    lines = (run.folder / "answers.jsonl").read_text().splitlines()
    return [json.loads(line)["base"] for line in lines]


def answered(run: Seen) -> tuple[bool, bool]:
    return (run.folder / "answers.jsonl").exists(), "exact_match" in run.json("summary.json")["tuned"]


class Part(str):
    """Equals every text that it is part of."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in str(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


# The runs


class Terminal(io.StringIO):
    """A screen that takes bars."""

    def isatty(self) -> bool:
        return True


def watch(run: Seen, patch: pytest.MonkeyPatch) -> None:
    """Notes what comes by at the borders of a run; everything goes on as it would."""
    loop_run, flat, popen = Loop.run, FastLayer._flat, subprocess.Popen
    generate = transformers.GenerationMixin.generate

    def run_loop(loop: Loop, metrics: Any) -> None:
        run.loop, model = loop, loop.model
        run.rows = [list(example.ids) for example in loop.train]
        run.drawn = snapshot(model)
        layers = decoder_layers(model)
        run.passes = [0] * len(layers)

        def computing(layer: Any, *args: Any) -> torch.Tensor:
            run.passes[layers.index(layer)] += layer.training
            return flat(layer, *args)

        def entering(decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if decoder.training:
                run.batches.append(kwargs["input_ids"].numel())

        patch.setattr(FastLayer, "_flat", computing)
        model.model.register_forward_pre_hook(entering, with_kwargs=True)

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
            run.steps.append(Step([group["lr"] for group in optimizer.param_groups], norm, {}))

        def behind(*_: Any) -> None:
            run.steps[-1].weights = snapshot(model)

        loop.optimizer.register_step_pre_hook(before)
        loop.optimizer.register_step_post_hook(behind)
        loop_run(loop, metrics)

    def snapshot(model: Any) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}

    def loading(kind: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(source: str, **options: Any) -> Any:
            if source == HUB_MODEL:
                run.loaded[kind] = dict(options)
                source = "../llama"
                options = {k: v for k, v in options.items() if k not in ("revision", "token", "cache_dir")}
            found = load(source, **options)
            if kind == "AutoTokenizer":
                run.tokenizer = found
            return found

        return from_pretrained

    def generating(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        out = generate(model, ids, **options)
        if run.loop is not None:  # behind the training, not to see what memory it takes
            run.generated.append((ids.shape[0], out.shape[1] - ids.shape[1]))
        return out

    class Process(popen):
        def __init__(self, command: Any, *args: Any, **options: Any) -> None:
            run.processes += "phinetune.data.worker" in str(command)
            super().__init__(command, *args, **options)

    for kind in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        own = getattr(transformers, kind)
        patch.setattr(own, "from_pretrained", loading(kind, own.from_pretrained))
    patch.setattr(Loop, "run", run_loop)
    patch.setattr(transformers.GenerationMixin, "generate", generating)
    patch.setattr(subprocess, "Popen", Process)
    patch.setattr("phinetune.data.tokenise.cache_folder", lambda: run.root.with_suffix(".cache"))


def serve_data_sets(run: Seen, patch: pytest.MonkeyPatch) -> None:
    """`datasets` has what it is asked for: other rows for each name, split and revision."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")

    def load_dataset(path: str, name: Any, *, split: str, revision: Any, download_config: Any) -> Any:
        run.data_sets.append({"path": path, "name": name, "split": split, "revision": revision})
        file = run.root.with_suffix(f".{name}-{split}-{revision}.arrow")
        table = pyarrow.Table.from_pylist([chat(f"{name} {split} {revision} {i}?", "Yes.") for i in range(4)])
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
        return SimpleNamespace(cache_files=[{"filename": str(file)}])

    patch.setattr(datasets, "load_dataset", load_dataset)


def settings_as_tree(settings: dict[str, Any]) -> dict[str, Any]:
    """{"data.train": "x", "data.train.weight": 2} is {"data": {"train": {"path": "x", "weight": 2}}}."""
    root: dict[str, Any] = {}
    for key, value in settings.items():
        *folders, name = key.split(".")
        at = root
        for folder in folders:
            if isinstance(at.get(folder), str):
                at[folder] = {"path": at[folder]}
            at = at.setdefault(folder, {})
        at[name] = value
    return root


@dataclass
class Lab:
    """Makes runs, each recipe once."""

    root: Path
    runs: dict[str, Seen] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self, settings: dict[str, Any], patched: Callable[[pytest.MonkeyPatch], None] | None, times: int) -> Seen:
        key = repr((sorted(settings.items()), patched, times))
        if key not in self.runs:
            self.runs[key] = self._run(settings, patched, times)
        return self.runs[key]

    def _run(self, settings: dict[str, Any], patched: Callable[[pytest.MonkeyPatch], None] | None, times: int) -> Seen:
        root = self.root / f"run-{next(self.numbers)}"
        root.mkdir()
        for _ in range(times):
            run, screen = Seen(root), Terminal()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(root)
                patch.setattr(sys, "stderr", screen)
                patch.setenv("TERM", "xterm")
                for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
                    patch.delenv(name, raising=False)
                watch(run, patch)
                if HUB_DATA in settings.values():
                    serve_data_sets(run, patch)
                if patched is not None:
                    patched(patch)
                try:
                    train(make_recipe(settings_as_tree(settings))[0])
                except PhinetuneError as error:
                    run.error = error
            run.screen = screen.getvalue()
        return run


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: Any) -> Lab:
    root = tmp_path_factory.mktemp("every-setting")
    for name, rows in FILES.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    biased = {"tie_word_embeddings": True, "attention_bias": True}
    for family, changes in (("llama", biased), ("phi3", {})):
        tiny_model(family, "sdpa", vocab_size=VOCABULARY, **changes).save_pretrained(root / family)
        smollm2_tokenizer.save_pretrained(root / family)
        shorten_vocabulary(root / family / "tokenizer.json")
    return Lab(root)


def shorten_vocabulary(path: Path) -> None:
    """To its first tokens, of which the later ones are made: reading and writing 49,152 is most of a small run."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def a_gpu(patch: pytest.MonkeyPatch) -> None:
    """A GPU seems to be there; the run ends where the model would go to its device."""

    def load_model(model: str, kwargs: Any, device: torch.device, *_: Any, **__: Any) -> None:
        raise RunError("model", f"goes to {device.type}", "end here")

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr("phinetune.train.finetune.load_model", load_model)


# The cases

DEFAULT = object()
SAME, OTHER = 3e-4, 3e-3  # shares of what has been learnt


@dataclass
class Case:
    """See above."""

    setting: str
    value: Any
    see: Callable[[Seen], Any] | None = None
    gives: tuple[Any, Any] | None = None
    given: dict[str, Any] = field(default_factory=dict)  # what else must be so, for the setting to matter
    was: Any = DEFAULT
    same: Callable[[Seen], Any] | None = None  # what must not change
    since: int | None = None
    unmoved: float | None = None
    patched: Callable[[pytest.MonkeyPatch], None] | None = None
    times: int = 1  # that the run is made in the same place

    def as_parameter(self) -> Any:
        value = str(self.value)
        name = f"{self.setting}={value}" if len(value) < 40 else self.setting
        return pytest.param(self, id=name)


def under(section: str, *cases: Case) -> list[Case]:
    return [replace(case, setting=f"{section}.{case.setting}") for case in cases]


def hub_row(name: str | None = None, split: str = "train", revision: str | None = None) -> tuple[Any, ...]:
    return name, split, revision, Part(f"{name} {split} {revision} 0?")


def written(folder: str) -> set[str]:
    return {folder, f"{folder}/checkpoint-3"}


def file(name: str, **more: Any) -> dict[str, Any]:
    return {"data.train": f"../{name}.jsonl", **more}


def template(source: str) -> dict[str, Any]:
    return {"tokenizer_kwargs.chat_template": source}


def training(**settings: Any) -> dict[str, Any]:
    return {f"training_config.{name}": value for name, value in settings.items()}


FEW = {"data.max_rejected": 0.9}  # rows may be left out
PLAINLY = template(PLAIN)
LONG = {**FEW, **PLAINLY, "data.train": ["../chats.jsonl", "../turns.jsonl"], "data.max_length": 30}
FIT = [24, 26, 27, 28, 28]  # tokens of the rows of LONG that are short enough
ONE_THOUGHT, TWO = "<think>Hm</think>One.<|im_end|>", "<think>Oh</think>Two.<|im_end|>"
THOUGHTS = file("thoughts", **template(WITHOUT_THOUGHTS))
TOLD = file("told", **template(WITHOUT_SYSTEM))
HELD_OUT = {"data.eval": "../doubled.jsonl"}
MODEL_OF_HUB, DATA_OF_HUB = {"model": HUB_MODEL}, {"data.train": HUB_DATA}
GERMAN = {"user": "frage", "assistant": "antwort"}
NONE_LEFT = Part("and none is left")

QUARTER = {"data.eval": 0.25}
IN_4BIT = {"model_kwargs.load_in_4bit": True}
MLFLOW = training(report_to="mlflow")
ASKED = {**QUARTER, "evaluation.metrics": ["exact_match"]}
TALKED = {**ASKED, "evaluation.max_new_tokens": 24}
DRAWN = {**TALKED, "evaluation.do_sample": True}
ANSWERED = {**ASKED, "data.eval": 0.5, "evaluation.max_new_tokens": 2}
EVALUATED = {**QUARTER, **training(eval_strategy="steps", eval_steps=1)}
# At this learning rate the held-out loss soon gets worse.
SPOILT = {**EVALUATED, **training(learning_rate=0.3, lr_scheduler_type="constant", max_steps=6, save_strategy="no")}
BEST_KEPT = {**SPOILT, **training(load_best_model_at_end=True)}
FAST = training(learning_rate=0.3)
ONE_EPOCH = training(max_steps=-1, num_train_epochs=1)
OFTEN = training(max_steps=4, save_strategy="steps", save_steps=1)

PACKABLE = {"data.max_length": 100, **training(per_device_train_batch_size=1)}
POLYNOMIAL = {**FAST, **training(lr_scheduler_type="polynomial")}

# What `seed` draws when neither the order nor the first weights hang on it: dropout.
DROPPED = {
    **training(data_seed=1),
    "peft_config.init_lora_weights": "olora",
    "peft_config.lora_dropout": 0.5,
}
PHI3, SECOND_LAYER = {"model": "../phi3"}, {"peft_config.layers_to_transform": [1]}
BOTH_LAYERS, Q_ALONE = {"0", "1"}, {"peft_config.target_modules": ["q_proj"]}
EMBEDDINGS = {"peft_config.target_modules": ["embed_tokens", "q_proj"], "peft_config.loraplus_lr_ratio": 4}
K_OF_PHI3 = ({"0.self_attn.qkv_proj", "1.self_attn.qkv_proj"}, 2 * 4 * (64 + 32))  # layers · r · (hidden + rows of k)

CASES = [
    Case("model", "../phi3", lambda run: run.model.config.model_type, ("llama", "phi3"), was="../llama"),
    Case(
        "tokenizer_kwargs",
        {"chat_template": PLAIN},
        lambda run: first_row(run)[:15],
        ("<|im_start|>sys", "<|im_start|>use"),
    ),
    *under(
        "model_kwargs",
        Case("dtype", "bfloat16", base_dtype, (torch.float32, torch.bfloat16), was="float32", since=1),
        Case("attn_implementation", "eager", attention, (("phinetune", 3), ("eager", 12)), unmoved=1e-3),
        Case("load_in_8bit", True, lambda run: len(quantised_layers(run.model).names), (0, 14), since=1),
        Case("load_in_4bit", True, lambda run: len(quantised_layers(run.model).names), (0, 14), since=1),
        Case("bnb_4bit_quant_type", "fp4", in_4bit("quant_type"), ({"nf4"}, {"fp4"}), IN_4BIT, since=1),
        Case("bnb_4bit_use_double_quant", False, in_4bit("blocksize2"), ({256}, {0}), IN_4BIT, since=1),
        Case(
            "bnb_4bit_compute_dtype",
            "bfloat16",
            in_4bit("compute_dtype"),
            ({torch.float32}, {torch.bfloat16}),
            IN_4BIT,
            since=1,
        ),
        Case("use_cache", True, lambda run: run.model.config.use_cache, (False, True)),
        Case("revision", "v2", asked("revision"), (["main"] * 3, ["v2"] * 3), MODEL_OF_HUB),
        Case("revision", "v2", lambda run: run.json("adapter_config.json")["revision"], (None, "v2"), MODEL_OF_HUB),
        Case("token", "hf_x", asked("token"), ([None] * 3, ["hf_x"] * 3), MODEL_OF_HUB),
        Case("cache_dir", "hub", asked("cache_dir"), ([None] * 3, ["hub"] * 3), MODEL_OF_HUB),
    ),
    *under(
        "data.train",
        Case("path", "../others.jsonl", rows_used, (12, 5), was="../chats.jsonl"),
        Case("split", "test", asked_of_data, (hub_row(split="train"), hub_row(split="test")), DATA_OF_HUB),
        Case("revision", "v2", asked_of_data, (hub_row(), hub_row(revision="v2")), DATA_OF_HUB),
        Case("name", "big", asked_of_data, (hub_row(), hub_row(name="big")), DATA_OF_HUB),
        Case("format", "text", first_row, (Part("What is"), "Once upon a time.<|im_end|>"), file("both")),
        Case("columns", GERMAN, outcome, (NONE_LEFT, Part("Drei")), file("pairs")),
        Case("weight", 2, rows_a_step, ([4] * 3, [4] * 6), ONE_EPOCH),
        Case("weight", 0.5, rows_a_step, ([4] * 3, [4, 2]), ONE_EPOCH),
    ),
    *under(
        "data",
        # which rows
        Case("train", "../others.jsonl", rows_used, (12, 5), was="../chats.jsonl"),
        Case("eval", 0.25, eval_rows, (None, 3)),
        Case("eval", "../others.jsonl", eval_rows, (None, 5)),
        Case("format", "text", first_row, (Part("What is"), "Once upon a time.<|im_end|>"), file("both")),
        Case("columns", GERMAN, outcome, (NONE_LEFT, Part("Drei")), file("pairs")),
        Case("max_rejected", 0.5, error, (Part("more than data.max_rejected=0.01"), ""), file("broken")),
        Case("duplicates", "drop", rows_used, (6, 4), file("doubled")),
        Case("duplicates", "raise", error, ("", Part("stand in the data before")), file("doubled")),
        Case("held_out_in_train", "keep", rows_used, (8, 12), HELD_OUT),
        Case("held_out_in_train", "raise", error, ("", Part("are held-out rows too")), HELD_OUT),
        Case("role_order", "keep", rows_used, (4, 5), {**FEW, **file("disorderly")}),
        Case("role_order", "raise", error, ("", Part("message 1 is the assis")), {**FEW, **file("disorderly")}),
        Case("empty_turns", "keep", rows_used, (4, 5), {**FEW, **file("with_empty")}),
        Case("empty_turns", "raise", error, ("", Part("message 1 (user) is empty")), {**FEW, **file("with_empty")}),
        # how a row becomes tokens
        Case("max_length", 30, lengths, (ANY, FIT), {**FEW, **PLAINLY}),
        Case("excess_length_strategy", "truncate", lengths, (FIT, [18] * 4 + FIT + [30] * 7), LONG),
        Case("excess_length_strategy", "split", lengths, (FIT, sorted([18, 25] * 4 + FIT)), LONG),
        Case("excess_length_strategy", "raise", error, ("", Part("has 32 tokens, above data.max_length=30")), LONG),
        Case("supervise", "last", lambda run: learnt(run)[0].count("One"), (1, 0), file("turns")),
        Case("supervise", "completion", lambda run: learnt(run)[0] == first_row(run), (False, True), file("turns")),
        Case(
            "supervise", "all", lambda run: learnt(run)[0] == first_row(run), (False, True), file("thoughts", **PLAINLY)
        ),
        Case("rewritten_turns", "last", learnt, ([ONE_THOUGHT, TWO], [TWO]), THOUGHTS),
        Case("rewritten_turns", "drop", error, ("", NONE_LEFT), THOUGHTS),
        Case("unwritten_system", "prepend", outcome, (NONE_LEFT, Part("user\nCount.\n\n1?<|im_end|>")), TOLD),
        Case("unwritten_system", "ignore", outcome, (NONE_LEFT, Part("user\n1?<|im_end|>")), TOLD),
        Case(
            "chat_template_kwargs", {"loudly": True}, beginning, ("<|im_start", "LOUD <|im_"), template(WITH_VARIABLE)
        ),
        Case("today", "2001-02-03", beginning, (ANY, "03.02.2001"), template(WITH_DATE)),
        Case("max_batch_tokens", 100, lambda run: max(run.batches) > 100, (True, False), unmoved=1e-3),
        Case("num_proc", 2, lambda run: run.processes, (0, 2), same=digest),
    ),
    *under(
        "training_config",
        # where, and how much
        Case("output_dir", "there/it is", tree, (written("runs/mine"), written("there/it is")), unmoved=0),
        Case("overwrite_output_dir", True, error, (Part("is not empty"), ""), times=2),
        Case("per_device_train_batch_size", 2, rows_a_step, ([4, 4, 4], [2, 2, 2])),
        Case("per_device_eval_batch_size", 4, prompts_at_once, ([6, 6], [4, 2, 4, 2]), ANSWERED),
        Case("gradient_accumulation_steps", 2, rows_a_step, ([4, 4, 4], [8, 4, 8])),
        Case("num_train_epochs", 1.5, step_count, (9, 5), training(max_steps=-1)),
        Case("max_steps", 2, step_count, (9, 2)),
        Case("packing", True, filled, (False, True), {**PACKABLE, **PLAINLY}),
        # the update
        Case("learning_rate", 0.3, rates, ([2e-4, 1.33333e-4, 6.6667e-5], [0.3, 0.2, 0.1]), since=1),
        Case("weight_decay", 0.5, shrunk, (1.0, 0.95), training(learning_rate=0.1)),
        Case("adam_beta1", 0.5, since=2),
        Case("adam_beta2", 0.5, since=2),
        Case("adam_epsilon", 1.0, stride, (1.0, 0.0), since=1),
        Case("optim", "adamw_torch_fused", is_fused, (False, True), unmoved=1e-3),
        Case("optim", "adamw_bnb_8bit", optimiser, ("AdamW", "AdamW8bit")),
        Case("optim", "adamw_8bit", optimiser, ("AdamW", "AdamW8bit")),
        Case("optim", "paged_adamw", optimiser, ("AdamW", "AdamW32bit")),
        Case("optim", "paged_adamw_32bit", optimiser, ("AdamW", "AdamW32bit")),
        Case("optim", "paged_adamw_8bit", optimiser, ("AdamW", "AdamW8bit")),
        Case("max_grad_norm", 0.01, gradient_norms, ([1.0] * 3, [0.01] * 3)),
        Case("max_grad_norm", 0, lambda run: max(gradient_norms(run)) > 1, (False, True)),
        Case("lr_scheduler_type", "constant", rates, ([0.3, 0.2, 0.1], [0.3, 0.3, 0.3]), FAST),
        Case("lr_scheduler_kwargs", {"power": 2.0}, rates, ([0.3, 0.2, 0.1], [0.3, 0.133333, 0.033333]), POLYNOMIAL),
        Case("warmup_steps", 2, rates, ([0.3, 0.2, 0.1], [0, 0.15, 0.3]), FAST),
        Case("seed", 7, order, since=0),
        Case("seed", 7, same=order, given=training(data_seed=1), since=0),
        Case("seed", 7, same=order, given=DROPPED, since=1),
        Case("data_seed", 7, order, since=1),
        Case("use_cpu", True, error, (Part("goes to cuda"), Part("goes to cpu")), patched=a_gpu),
        # memory
        Case("gradient_checkpointing", True, passes, ([3, 3], [6, 6]), unmoved=0),
        Case("gradient_checkpointing_layers", 1, passes, ([3, 3], [6, 3]), unmoved=0),
        Case("max_memory_gb", 0.001, passes, ([3, 3], [6, 6]), unmoved=0),
        Case("gradient_checkpointing_kwargs", {"use_reentrant": True}, answers_to_reentrant, (False, True)),
        # what is written, and when
        Case("logging_strategy", "epoch", losses_at, ([1, 2, 4, 5], [1, 3, 5]), training(logging_steps=2, max_steps=5)),
        Case("logging_strategy", "no", losses_at, ([1, 3], [])),
        Case("logging_steps", 2, losses_at, ([1, 3], [1, 2, 3])),
        Case("logging_first_step", False, losses_at, ([1, 3], [3])),
        Case("logging_dir", "board", boards, ({"runs/mine/tensorboard"}, {"board"}), training(report_to="tensorboard")),
        Case("log_level", "warning", levels, ({"INFO"}, set())),
        Case("disable_tqdm", True, lambda run: "training" in run.screen, (True, False)),
        Case("report_to", "tensorboard", boards, (set(), {"runs/mine/tensorboard"})),
        Case("run_name", "a try", experiments, ({"phinetune": {"mine"}}, {"phinetune": {"a try"}}), MLFLOW),
        Case("project", "ours", experiments, ({"phinetune": {"mine"}}, {"ours": {"mine"}}), MLFLOW),
        Case("eval_strategy", "steps", evaluated_at, ([3], [1, 2, 3]), {**QUARTER, **training(logging_steps=1)}),
        Case("eval_strategy", "epoch", evaluated_at, ([5], [3, 5]), {**QUARTER, **training(max_steps=5)}),
        Case("eval_steps", 2, evaluated_at, ([3], [2, 3]), EVALUATED),
        Case("eval_on_start", True, evaluated_at, ([3], [0, 3]), QUARTER),
        Case("save_strategy", "steps", checkpoints, ([3, 4], [4]), training(max_steps=4)),
        Case("save_strategy", "no", checkpoints, ([3], [])),
        Case("save_steps", 2, checkpoints, ([3], [2, 3]), training(save_strategy="steps")),
        Case("save_total_limit", 3, checkpoints, ([3, 4], [2, 3, 4]), OFTEN),
        Case("save_total_limit", None, checkpoints, ([3, 4], [1, 2, 3, 4]), OFTEN),
        # the best
        Case("load_best_model_at_end", True, lambda run: kept(run) == [best(run)], (False, True), SPOILT),
        Case("metric_for_best_model", "eval_loss", lambda run: best(run) in checkpoints(run), (False, True), SPOILT),
        Case("metric_for_best_model", "perplexity", best_metric, ("eval_loss", "perplexity"), BEST_KEPT),
        Case("early_stopping_patience", 1, lambda run: step_count(run) == best(run) + 1, (False, True), SPOILT),
        Case("early_stopping_threshold", 100, step_count, (3, 2), {**EVALUATED, **training(early_stopping_patience=1)}),
    ),
    *under(
        "peft_config",
        # where
        Case("target_modules", ["q_proj"], adapted, (ANY, {"0.self_attn.q_proj", "1.self_attn.q_proj"})),
        Case("target_modules", "model.layers.0.*_proj", numbers_adapted, (BOTH_LAYERS, {"0"})),
        Case("target_modules", ["k_proj"], lambda run: (adapted(run), parameters(run)), (ANY, K_OF_PHI3), PHI3),
        Case("exclude_modules", ["q_proj"], q_adapted, (True, False)),
        Case("layers_to_transform", [1], numbers_adapted, (BOTH_LAYERS, {"1"})),
        Case("layers_pattern", "blocks", error, ("", Part("no adapted layer has the number 1")), SECOND_LAYER),
        Case("modules_to_save", ["lm_head"], lambda run: "lm_head.weight" in kinds_saved(run), (False, True)),
        Case("bias", "lora_only", biases_saved, (set(), {"q_proj"}), Q_ALONE),
        Case("bias", "all", biases_saved, (set(), {"q_proj", "k_proj", "v_proj", "o_proj"}), Q_ALONE),
        # what; Adam's first step is the same whatever the scaling
        Case("r", 8, ranks, ({16}, {8})),
        Case("rank_pattern", {"q_proj": 8}, ranks, ({4}, {4, 8})),
        Case("lora_alpha", 8, scalings, ({8.0}, {2.0}), same=first_loss, since=2),
        Case("alpha_pattern", {"q_proj": 8}, scalings, ({8.0}, {8.0, 2.0}), same=first_loss, since=2),
        Case("use_rslora", True, scalings, ({8.0}, {16.0}), same=first_loss, since=2),
        Case("lora_dropout", 0.5, dropout_saved, (0.05, 0.5), same=first_loss, since=1),
        Case("use_dora", True, lambda run: "q_proj.lora_magnitude_vector" in kinds_saved(run), (False, True)),
        Case("init_lora_weights", "gaussian", spread, (False, True), same=first_loss, since=0),
        Case("init_lora_weights", False, begins_at_zero, (True, False), since=0),
        Case("init_lora_weights", "pissa", begins_at_zero, (True, False), same=first_loss, since=0),
        Case("init_lora_weights", "olora", begins_at_zero, (True, False), same=first_loss, since=0),
        Case("loraplus_lr_ratio", 4, stride, (1.0, 4.0), since=1),
        Case("loraplus_lr_embedding", 1e-3, all_rates, ([1e-6, 2e-4, 8e-4], [2e-4, 8e-4, 1e-3]), EMBEDDINGS, since=1),
        Case("task_type", "SEQ_CLS", error, ("", Part("task_type='SEQ_CLS': input should be 'CAUSAL_LM'"))),
    ),
    *under(
        "evaluation",
        Case("metrics", ["exact_match"], answered, ((False, False), (True, True)), QUARTER),
        Case("max_new_tokens", 3, lambda run: {new for _, new in run.generated}, (ANY, {3}), ASKED),
        Case("do_sample", True, base_said, given=TALKED),
        Case("temperature", 0.01, base_said, given=DRAWN),
        Case("top_k", 1, base_said, given=DRAWN),
        Case("top_p", 0.01, base_said, given=DRAWN),
        Case("min_p", 0.9, base_said, given=DRAWN),
        Case("repetition_penalty", 9.0, base_said, given=TALKED),
        Case("no_repeat_ngram_size", 1, base_said, given=TALKED),
    ),
]


# The tests


def settings_of(section: type[Section], folder: str = "") -> Iterator[str]:
    for name, own in section.model_fields.items():
        if isinstance(own.annotation, type) and issubclass(own.annotation, Section):
            yield from settings_of(own.annotation, f"{folder}{name}.")
        else:
            yield folder + name


def test_every_setting_has_a_case() -> None:
    settings = {*settings_of(Recipe), *settings_of(DataSource, "data.train.")}
    assert {case.setting for case in CASES} == settings
    assert all(case.see or case.since is not None for case in CASES)


@pytest.mark.parametrize("case", [case.as_parameter() for case in CASES])
def test_a_setting_changes_what_it_is_for(case: Case, lab: Lab) -> None:
    settings = {**BASE, **case.given}
    settings.pop(case.setting, None)
    changed = {**settings, case.setting: case.value}
    if case.was is not DEFAULT:
        settings[case.setting] = case.was
    before, after = (lab.run(own, case.patched, case.times) for own in (settings, changed))
    if case.see not in MAY_END:
        assert (before.error, after.error) == (None, None)
    if case.see is not None:
        seen = case.see(before), case.see(after)
        assert seen[0] != seen[1]
        assert case.gives is None or seen == case.gives
    if case.same is not None:
        assert case.same(before) == case.same(after)
    if case.since is not None:
        distances = [apart(before, after, step) for step in range(case.since + 1)]
        assert max(distances[:-1], default=0) < SAME
        assert distances[-1] > OTHER
    if case.unmoved is not None:
        assert max(apart(before, after, step) for step in range(len(before.weights))) <= case.unmoved
