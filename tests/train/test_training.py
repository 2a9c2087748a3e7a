"""Runs from Python: what they learn, what they write, and what they refuse."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import draw_lora_B, relative_error, tiny_config, tiny_model

import phinetune
from phinetune import lora
from phinetune.data import Example
from phinetune.errors import RecipeError, RunError
from phinetune.model import adapt_model, flat_batches
from phinetune.recipe import PeftConfig, TrainingConfig
from phinetune.train import training_step
from phinetune.train.checkpoint import Base, load_checkpoint, save_checkpoint
from phinetune.train.folder import WRITTEN, give_up_later
from phinetune.train.numbers import name_fault
from phinetune.train.optimiser import learning_rates, make_optimizer

TINY = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 2e-3}


def test_a_run_writes_what_the_contract_says(tmp_path, tiny_llama_folder, chats):
    folder = tmp_path / "run"
    result = phinetune.finetune(
        model=str(tiny_llama_folder),
        train=str(chats),
        eval=0.1,
        training_config={
            **TINY, "output_dir": str(folder), "num_train_epochs": 3, "logging_steps": 4,
            "evaluation_strategy": "steps", "eval_steps": 9, "save_steps": 7, "save_strategy": "steps",
            "report_to": "tensorboard",
        },
        peft_config={"r": 4},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 4},
        model_kwargs={"dtype": "float32"},
    )  # fmt: skip
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "recipe.yaml",
        "train.log", "metrics.jsonl", "summary.json", "ledger.json", "rejected.jsonl", "answers.jsonl", "tensorboard",
        "checkpoint-21", "checkpoint-27",
    }  # fmt: skip
    assert "checkpoint-7" not in names, "save_total_limit is 2"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert summary["rows"] == 36
    assert summary["steps"] == 27
    assert summary["eval_rows"] == 4
    assert summary["tuned"]["eval_loss"] < summary["base"]["eval_loss"] - 1
    assert {"eval_loss", "perplexity", "exact_match"} == set(summary["base"])
    assert 0.1 < summary["peak_gb"] < 8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 4, 8, 12, 16, 20, 24, 27]
    assert set(logged[0]) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second",
    }  # fmt: skip
    assert [line["step"] for line in lines if "eval_loss" in line] == [9, 18, 27]
    assert lines[-1]["eval_loss"] == pytest.approx(summary["tuned"]["eval_loss"], rel=1e-4)
    ledger = json.loads((folder / "ledger.json").read_text())
    assert logged[-1]["supervised_tokens"] == 3 * ledger["train"]["supervised"]
    assert "expected: " in (folder / "train.log").read_text()
    assert list((folder / "tensorboard").glob("events.out.*"))


def test_rows_from_python_give_the_same_as_a_file(tmp_path, tiny_llama_folder, chats):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    losses = []
    for i, source in enumerate((chats, rows)):
        result = phinetune.finetune(
            model=str(tiny_llama_folder),
            train=source,
            training_config={**TINY, "output_dir": str(tmp_path / str(i)), "max_steps": 3},
            model_kwargs={"dtype": "float32"},
        )
        losses.append([json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]


def examples(count=6, seed=0, length=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length, (count,), generator=generator).tolist()
    return [
        Example(f"row {i}", torch.randint(3, 900, (n,), generator=generator).tolist(), [j > 1 for j in range(n)])
        for i, n in enumerate(lengths)
    ]


def step_of(rows, *, dropout=0.0, max_batch_tokens=4096, checkpointing=False, family="llama"):
    model = tiny_model(family)
    adapt_model(model, PeftConfig(r=4, lora_dropout=dropout), seed=1)
    draw_lora_B(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = make_optimizer(model, TrainingConfig(), PeftConfig())
    settings = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "max_batch_tokens": max_batch_tokens, "seed": (3, 0)}
    loss, norm = training_step(model, optimizer, rows, **settings)
    weights = {f"{name}.A": layer.lora_A for name, layer in lora.lora_layers(model)}
    weights |= {f"{name}.m": optimizer.state[layer.lora_A]["exp_avg"] for name, layer in lora.lora_layers(model)}
    return loss, norm, {name: tensor.detach().clone() for name, tensor in weights.items()}  # m is the gradient, scaled


@pytest.mark.parametrize("max_batch_tokens", [1, 13, 40])
def test_the_layout_does_not_change_the_update(max_batch_tokens):
    loss, norm, weights = step_of(examples())
    other_loss, other_norm, other = step_of(examples(), max_batch_tokens=max_batch_tokens)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_norm == pytest.approx(norm, rel=1e-5)
    assert all(relative_error(other[name], weights[name]) < 1e-5 for name in weights)


def test_gradient_checkpointing_does_not_change_the_update_under_dropout():
    loss, norm, weights = step_of(examples(), dropout=0.2)
    other_loss, other_norm, other = step_of(examples(), dropout=0.2, checkpointing=True)
    assert other_loss == loss
    assert other_norm == pytest.approx(norm, rel=1e-6)
    assert all(torch.equal(other[name], weights[name]) for name in weights)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = tiny_model("llama")
    adapt_model(model, PeftConfig(r=4), seed=1)
    with torch.no_grad():
        next(lora.lora_layers(model))[1].lora_A[0, 0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "max_batch_tokens": 100, "seed": (0,)}
    with pytest.raises(FloatingPointError):
        training_step(model, make_optimizer(model, TrainingConfig(), PeftConfig()), examples(), **settings)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, model.parameters(), strict=True))


def test_a_run_names_the_step_and_the_rows_that_were_not_finite(tmp_path, tiny_llama_folder, chats):
    with pytest.raises(RunError, match=r"step \d+: loss .*chats.jsonl:\d+.*nothing was updated"):
        phinetune.finetune(
            model=str(tiny_llama_folder),
            train=str(chats),
            training_config={
                **TINY, "output_dir": str(tmp_path / "run"), "learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 5,
                "lr_scheduler_type": "constant",
            },
            model_kwargs={"dtype": "float32"},
        )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"]
)
def test_learning_rates_are_those_of_transformers(name):
    from transformers import get_scheduler

    config = TrainingConfig(learning_rate=1e-3, lr_scheduler_type=name, warmup_steps=0.16)  # of 20: 3.2, so 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    rate = learning_rates(config, 20)
    for step in range(20):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_checkpoint_of_a_merged_linear_goes_on_bit_for_bit(tmp_path, optim):
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = TrainingConfig(optim=optim)

    def start():
        model = tiny_model("phi3")
        adapt_model(model, PeftConfig(r=4, lora_dropout=0.1, target_modules=names), seed=1)
        return model.train(), make_optimizer(model, config, PeftConfig())

    def go(model, optimizer, steps):
        for step in steps:
            settings = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "max_batch_tokens": 40, "seed": (3, step)}
            training_step(model, optimizer, examples(seed=step), **settings)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = go(*start(), range(4))
    first = start()
    go(*first, range(2))
    path = save_checkpoint(tmp_path, 2, *first, {}, Base("tiny", None), keep=None)
    second = start()
    load_checkpoint(path, *second)
    resumed = go(*second, range(2, 4))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_output_folder_is_emptied_of_a_runs_files_alone(tmp_path, tiny_llama_folder, chats):
    folder = tmp_path / "run"
    settings = {
        "model": str(tiny_llama_folder),
        "train": str(chats),
        "training_config": {**TINY, "output_dir": str(folder), "max_steps": 1},
        "model_kwargs": {"dtype": "float32"},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="holds no run of phinetune's, so it is not emptied"):
        phinetune.finetune(**settings, overwrite=True)
    (folder / "recipe.yaml").unlink()
    phinetune.finetune(**settings)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-99").mkdir()
    (folder / "checkpoint-1-merged").mkdir()  # as `phinetune merge` calls it
    phinetune.finetune(**settings, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "checkpoint-99").exists()
    others = {path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in WRITTEN)}
    assert others == {"notes.txt", "checkpoint-1", "checkpoint-1-merged"}


def test_learning_rates_by_hand():
    rate = learning_rates(TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2), 6)
    assert [rate(step) for step in range(6)] == [0, 0.5, 1.0, 0.75, 0.5, 0.25]


def test_small_phi3_learns_real_instructions(tmp_path, phi3_tokenizer, alpaca_chats):
    """A random Phi-3 with the real tokenizer on real rows, by the samples' target names."""
    from transformers import Phi3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "phi3"
    Phi3ForCausalLM(tiny_config("phi3", vocab_size=32064, pad_token_id=32000, eos_token_id=32000)).save_pretrained(
        folder
    )
    phi3_tokenizer.save_pretrained(folder)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    result = phinetune.finetune(
        model=str(folder),
        train=alpaca_chats[:60],
        eval=alpaca_chats[60:70],
        training_config={**TINY, "output_dir": str(tmp_path / "run"), "num_train_epochs": 2, "learning_rate": 1e-2},
        peft_config={"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": names},
        model_kwargs={"dtype": "float32"},
    )
    assert result.summary["tuned"]["eval_loss"] < result.summary["base"]["eval_loss"] - 0.1
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert config["rank_pattern"] == {"gate_up_proj": 16, "qkv_proj": 24}
    assert config["alpha_pattern"] == {"gate_up_proj": 32, "qkv_proj": 48}


def test_early_stopping_keeps_the_best_adapter(tmp_path, tiny_llama_folder, chats):
    """At a learning rate that soon spoils the held-out loss; transformers' EarlyStoppingCallback counts the same."""
    folder = tmp_path / "run"
    result = phinetune.finetune(
        model=str(tiny_llama_folder),
        train=str(chats),
        eval=0.1,
        training_config={
            **TINY, "output_dir": str(folder), "learning_rate": 0.3, "lr_scheduler_type": "constant",
            "num_train_epochs": 20, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2,
            "load_best_model_at_end": True, "early_stopping_patience": 3,
        },
        model_kwargs={"dtype": "float32"},
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(evaluated, key=evaluated.__getitem__)
    assert result.summary["steps"] == max(evaluated) == best + 3 * 2 < 180
    assert (folder / f"checkpoint-{best}").is_dir()
    assert result.summary["tuned"]["eval_loss"] == pytest.approx(evaluated[best], rel=1e-4)
    assert len(evaluated) == sum("eval_loss" in line for line in lines), "the best one isn't drawn at the last step"


def test_a_finished_run_that_is_resumed_evaluates_its_last_step_once(tmp_path, tiny_llama_folder, chats):
    for resume in (False, True):
        phinetune.finetune(
            model=str(tiny_llama_folder), train=str(chats), eval=0.1, resume=resume, rehearsal=False,
            training_config={**TINY, "output_dir": str(tmp_path / "run"), "max_steps": 2},
        )  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "eval_loss" in line] == [2]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_a_folder_of_somebody_elses_is_not_resumed_into(tmp_path, tiny_llama_folder, chats):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("# my own words")
    config = {**TINY, "output_dir": str(folder)}
    with pytest.raises(RecipeError, match="holds no run of phinetune's that could be resumed"):
        phinetune.finetune(model=str(tiny_llama_folder), train=str(chats), training_config=config, resume=True)
    assert [path.read_text() for path in folder.iterdir()] == ["# my own words"]


def test_going_on_from_an_earlier_checkpoint_gives_up_the_later_ones(tmp_path):
    model = tiny_model("llama")
    adapt_model(model, PeftConfig(r=4), seed=1)
    optimizer = make_optimizer(model, TrainingConfig(), PeftConfig())

    def save(step, best=None):
        save_checkpoint(tmp_path, step, model, optimizer, {}, Base("tiny", None), keep=2, best=best)
        return sorted(int(path.name.partition("-")[2]) for path in tmp_path.iterdir())

    assert [save(2), save(4), save(6), save(8, best=4)] == [[2], [2, 4], [4, 6], [4, 6, 8]]
    give_up_later(tmp_path, 4, is_over=False)
    assert save(5, best=4) == [4, 5], "not 6 and 8, which the next resumption would take for its own"


def test_what_decides_needs_evaluations(tmp_path, tiny_llama_folder, chats):
    config = {**TINY, "output_dir": str(tmp_path / "run"), "early_stopping_patience": 2}
    with pytest.raises(RecipeError, match=r"early_stopping_patience: needs held-out rows.*set data.eval"):
        phinetune.finetune(model=str(tiny_llama_folder), train=str(chats), training_config=config)
    config |= {"eval_strategy": "steps", "eval_steps": 500, "max_steps": 3}
    with pytest.raises(RecipeError, match=r"early_stopping_patience: needs evaluations.*none falls into 3 steps"):
        phinetune.finetune(model=str(tiny_llama_folder), train=str(chats), eval=0.1, training_config=config)


def test_what_a_model_was_not_made_for(tmp_path, tiny_llama_folder, chats):
    def run(**settings):
        config = {**TINY, "output_dir": str(tmp_path / "run"), "max_steps": 1}
        phinetune.finetune(
            model=str(tiny_llama_folder), train=str(chats), training_config=config, overwrite=True, **settings
        )
        return (tmp_path / "run" / "train.log").read_text()

    for name in ("dtype", "bnb_4bit_compute_dtype"):
        with pytest.raises(RecipeError, match=f"{name}=float16: is not for training"):
            run(model_kwargs={name: "float16"})
    with pytest.raises(RecipeError, match=r"tokenizer_kwargs: makes [\d,]+ tokens, and .* has embeddings for"):
        run(tokenizer_kwargs={"eos_token": "<|a new one|>"})
    assert "positions" not in run()
    config = json.loads((tiny_llama_folder / "config.json").read_text())
    short = tmp_path / "short"
    shutil.copytree(tiny_llama_folder, short)
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    said = phinetune.finetune(
        model=str(short), train=str(chats), training_config={**TINY, "output_dir": str(tmp_path / "b"), "max_steps": 1}
    )
    assert "was made for 16 positions, and the longest row has" in (said.folder / "train.log").read_text()


def test_one_run_is_one_process(tmp_path, tiny_llama_folder, chats, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = {**TINY, "output_dir": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match="WORLD_SIZE: asks for 2 processes, and a run is one; start it without"):
        phinetune.finetune(model=str(tiny_llama_folder), train=str(chats), training_config=config)


def test_norms_and_biases_have_no_weight_decay():
    """As transformers' Trainer has it."""
    model = tiny_model("llama")
    config, peft_config = TrainingConfig(weight_decay=0.1), PeftConfig(modules_to_save=["norm", "lm_head"])
    adapt_model(model, peft_config, seed=1)
    groups = {
        group["weight_decay"]: group["params"] for group in make_optimizer(model, config, peft_config).param_groups
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(parameter)] for parameter in groups[0.0])
    assert not any("norm" in names[id(parameter)] for parameter in groups[0.1])


def test_a_fault_is_named_where_it_begins():
    model = tiny_model("llama")
    adapt_model(model, PeftConfig(r=4), seed=1)
    batches = flat_batches(model, examples(), 100)
    assert name_fault(model, batches) == "with dropout off every number is finite"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf
    assert name_fault(model, batches) == "the weights of model.layers.1.mlp.down_proj.weight are not finite"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0
        model.model.layers[1].mlp.down_proj.weight.mul_(3e38)
    assert name_fault(model, batches) == "the output of model.layers.1.mlp.down_proj is not finite"


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    model = tiny_model("llama")
    adapt_model(model, PeftConfig(r=4), seed=1)
    optimizer = make_optimizer(model, TrainingConfig(), PeftConfig())
    with torch.no_grad():
        next(lora.lora_layers(model))[1].lora_B[0, 0] = math.nan
    with pytest.raises(RunError, match=r"step 2: .*lora_B holds numbers that are not finite: nothing was saved"):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, Base("tiny", None), keep=None)
    assert not list(tmp_path.iterdir())


def test_a_step_without_targets_is_an_error():
    model = tiny_model("llama")
    adapt_model(model, PeftConfig(r=4), seed=1)
    rows = [Example("row 1", [5, 6, 7], [False] * 3)]
    settings = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "max_batch_tokens": 100, "seed": (0,)}
    with pytest.raises(ValueError, match="no token of the step's rows is supervised"):
        training_step(model, make_optimizer(model, TrainingConfig(), PeftConfig()), rows, **settings)


LONG_CALL = """
import sys
from phinetune.train.signals import listening

with listening() as signals, signals.deferred():
    print("begun", flush=True)
    sum(range(int(sys.argv[1])))  # looks at no signal before it ends
    print("went on")
"""


def test_two_signals_in_one_long_call_end_the_process():
    """Python tells of them once, when the call is over."""
    begin = time.perf_counter()
    sum(range(10**7))
    enough = int(10**7 * 1.5 / (time.perf_counter() - begin))
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", LONG_CALL, str(enough)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        for _ in range(2):
            time.sleep(0.2)
            process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest) == (-number, "")
