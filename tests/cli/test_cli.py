"""The command line as a person meets it."""

import json
import subprocess
import sys
import time

import pytest
from commands import phinetune
from transformers import GenerationMixin
from typer.testing import CliRunner

from phinetune.cli.app import app


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "phinetune", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5


def test_the_verbs_are_those_that_work():
    shown = phinetune("--help").stdout
    verbs = [line.split()[1] for line in shown.splitlines() if line.startswith("│ ") and line[2:3].isalpha()]
    before, after = ["demo", "init", "train", "verify-resume", "plan", "explain"], ["report", "doctor", "chat", "data"]
    assert verbs == [*before, "evaluate", "merge", "push", *after]
    assert all(phinetune(verb, "--help").returncode == 0 for verb in verbs)


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder, chats):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_llama_folder}\n"
        "model_kwargs: {dtype: float32}\n"
        f"data: {{train: {chats}, eval: 0.1}}\n"
        f"training_config: {{output_dir: {tmp_path / 'run'}, max_steps: 3, use_cpu: true}}\n"
    )
    return path


def bad(finished, *parts):
    """Exit 2, one message with these parts, no traceback, nothing on standard output."""
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("error:") == 1
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    for part in parts:
        assert part in finished.stderr


def test_an_unknown_key(recipe):
    bad(phinetune("train", recipe, "learning_rat=1"), "learning_rat", "did you mean learning_rate?")
    recipe.write_text(recipe.read_text().replace("max_steps", "max_stepps"))
    bad(phinetune("train", recipe), str(recipe), "training_config.max_stepps", "did you mean max_steps?")


def test_a_missing_file(recipe, tmp_path):
    bad(phinetune("train", tmp_path / "no.yaml"), "no.yaml: no such recipe; ")
    bad(phinetune("train", recipe, "data.train=no.jsonl"), "no.jsonl: no such file; ")
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_bad_rows(recipe, chats):
    with chats.open("a") as file:
        file.write("nonsense\n" * 5)
    bad(
        phinetune("train", recipe),
        "5 of 45 rows can't be used, more than data.max_rejected=0.01",
        f"{chats}:41: is not valid JSON",
    )


def test_a_model_that_cannot_be_had_is_said_at_once(recipe, tmp_path):
    begin = time.perf_counter()
    bad(phinetune("train", recipe, "model=nobody/nothing"), "model nobody/nothing", "smollm2")
    assert time.perf_counter() - begin < 30
    bad(phinetune("train", recipe, "model=./no-folder"), "model ./no-folder: no such folder; ")
    (tmp_path / "empty").mkdir()
    bad(phinetune("train", recipe, f"model={tmp_path / 'empty'}"), "can't be loaded")


def test_targets_that_match_nothing(recipe):
    finished = phinetune("train", recipe, "target_modules=[qkv_proj]")
    assert finished.returncode == 2
    assert "'qkv_proj'" in finished.stderr
    assert "q_proj, up_proj, v_proj" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_usage_errors():
    bad(phinetune("train"), "phinetune train: ", "--help")
    bad(phinetune("tarin"), "tarin")
    assert "Usage: " in phinetune().stdout
    bad(phinetune("train", "recipe.yaml", "--overwrit"), "--overwrit")


def test_a_folder_that_is_not_empty_is_refused(recipe, tmp_path):
    assert phinetune("train", recipe).returncode == 0
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    bad(phinetune("train", recipe), "is not empty", "--resume", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    assert phinetune("train", recipe, "--overwrite").returncode == 0


def test_train_evaluate_and_chat(recipe, tmp_path, chats):
    finished = phinetune("train", recipe)
    assert finished.returncode == 0, finished.stderr
    assert "36 rows" in finished.stderr
    assert "expected: " in finished.stderr
    run = tmp_path / "run"

    measured = phinetune("evaluate", run, "--json", "--max-new-tokens", "3")
    assert measured.returncode == 0, measured.stderr
    summary = json.loads(measured.stdout)
    assert summary["eval_rows"] == 4
    trained = json.loads((run / "summary.json").read_text())
    for who in ("base", "tuned"):
        assert summary[who]["eval_loss"] == pytest.approx(trained[who]["eval_loss"], rel=1e-4)
    other = json.loads(phinetune("evaluate", run, "--data", chats, "--no-answers", "--json").stdout)
    assert other["eval_rows"] == 40
    assert "eval_loss" in phinetune("evaluate", run, "--no-answers").stdout

    said = phinetune("chat", run, "--prompt", "What is 3 plus 4?", "--max-new-tokens", "5", "--compare")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("base   ")
    assert "\ntuned  " in said.stdout
    talk = phinetune("chat", run, "--max-new-tokens", "3", input="Hi\n\nBye\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.count("\n") >= 2


def test_chat_with_what_is_no_adapter(tmp_path, tiny_llama_folder):
    assert phinetune("chat", tiny_llama_folder, "-p", "Hi", "--max-new-tokens", "2").returncode == 0
    bad(phinetune("chat", tiny_llama_folder, "-p", "Hi", "--compare"), "is no adapter")
    bad(phinetune("chat", tmp_path / "nowhere", "-p", "Hi"), "no such folder")


def test_init_writes_a_recipe_that_trains(tmp_path, tiny_llama_folder, chats):
    chats = chats.rename(tmp_path / "my: chats #1.jsonl")
    path = tmp_path / "mine.yaml"
    written = phinetune("init", chats, "-o", path, "--model", tiny_llama_folder)
    assert written.returncode == 0, written.stderr
    assert "40 chats can be used" in written.stdout
    assert f"phinetune train {path}" in written.stdout
    bad(phinetune("init", chats, "-o", path), "is there already")
    run = phinetune("train", path, f"output_dir={tmp_path / 'run'}", "max_steps=2", "dtype=float32")
    assert run.returncode == 0, run.stderr
    bad(phinetune("init", tmp_path / "no.jsonl", "-o", tmp_path / "other.yaml"), "no such file")


def test_evaluate_does_not_take_changed_data_for_held_out(recipe, tmp_path, chats):
    assert phinetune("train", recipe).returncode == 0
    chats.write_text(chats.read_text() + chats.read_text().splitlines()[0] + "\n")
    bad(phinetune("evaluate", tmp_path / "run", "--no-answers"), "the data has changed since the run", "--data")


def test_a_held_out_file_that_has_changed_is_said(recipe, tmp_path, chats):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(chats.read_text().splitlines(keepends=True)[:3]))
    own = ["eval=" + str(held), "data.held_out_in_train=keep"]
    assert phinetune("train", recipe, *own).returncode == 0
    same = phinetune("evaluate", tmp_path / "run", "--no-answers")
    held.write_text("".join(chats.read_text().splitlines(keepends=True)[:4]))
    other = phinetune("evaluate", tmp_path / "run", "--no-answers")
    assert (same.returncode, other.returncode) == (0, 0), same.stderr + other.stderr
    assert "has changed since" not in same.stderr
    assert "held.jsonl has changed since" in other.stderr and "other rows are measured" in other.stderr


def test_init_proposes_a_model_for_the_machine(tmp_path, chats):
    written = phinetune("init", chats, "-o", tmp_path / "mine.yaml")
    assert written.returncode == 0, written.stderr
    assert "model: smollm2" in (tmp_path / "mine.yaml").read_text(), "the Hub is out of reach in tests"


def test_held_out_files_are_read_whatever_became_of_the_training_rows(recipe, tmp_path, chats):
    held = tmp_path / "held.jsonl"
    lines = chats.read_text().splitlines(keepends=True)
    held.write_text("".join(lines[:3]))
    assert phinetune("train", recipe, f"data.eval={held}", "max_steps=1").returncode == 0
    chats.write_text("".join(lines[10:]))
    measured = phinetune("evaluate", tmp_path / "run", "--no-answers", "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["eval_rows"] == 3


def test_a_run_whose_ledger_is_gone(recipe, tmp_path):
    assert phinetune("train", recipe, "data.eval=0.1", "max_steps=1").returncode == 0
    path = tmp_path / "run" / "ledger.json"
    for ledger in ("{", "[]", None):
        path.unlink() if ledger is None else path.write_text(ledger)
        measured = phinetune("evaluate", tmp_path / "run", "--no-answers")
        assert measured.returncode == 2
        assert "what was held out then is not known; give held-out rows with --data" in measured.stderr
        assert "Traceback" not in measured.stderr


def test_words_with_odd_line_ends_come_into_the_report(recipe, tmp_path):
    odd = "one\u2028two\u2029three\u0085four"
    rows = [
        {"messages": [{"role": "user", "content": f"{odd} {i}"}, {"role": "assistant", "content": odd}]}
        for i in range(4)
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = [f"data.eval={tmp_path / 'odd.jsonl'}", "max_steps=1", "evaluation.metrics=[exact_match]"]
    ended = phinetune("train", recipe, *settings, "evaluation.max_new_tokens=2")
    assert ended.returncode == 0, ended.stderr
    assert "there is no report" not in ended.stderr
    assert "one\u2028two" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "sampling"),
    [(["--temperature", "1.7"], {"do_sample": True, "temperature": 1.7}), ([], {"do_sample": False})],
)
def test_a_chats_temperature_and_system_message_reach_generation(
    tiny_llama_folder, smollm2_tokenizer, monkeypatch, given, sampling
):
    real, seen = GenerationMixin.generate, {}

    def generate(model, ids, **settings):
        seen.update(settings, ids=ids)
        return real(model, ids, **settings)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr("phinetune.cli.quiet.quiet_libraries", lambda: None)  # it would last
    asked = ["-p", "What is 3 plus 4?", "--system", "You add numbers.", "--max-new-tokens", "2"]
    ran = CliRunner().invoke(app, ["chat", str(tiny_llama_folder), *asked, *given])
    assert ran.exit_code == 0, ran.output
    messages = [{"role": "system", "content": "You add numbers."}, {"role": "user", "content": "What is 3 plus 4?"}]
    prompt = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert seen["ids"].tolist() == [prompt]
    assert {name: seen.get(name) for name in sampling} == sampling
