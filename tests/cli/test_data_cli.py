"""`phinetune data check`, `data preview`, and the chat format's fingerprint, through the real command line."""

import json
import re

import pytest
from commands import phinetune
from conftest import SHARED_DATA
from typer.testing import CliRunner

from phinetune.cli.app import app


def write_mixed(folder):
    """A folder of Parquet and JSON Lines in two formats, with two bad rows."""
    from pyarrow import Table, parquet

    folder.mkdir()
    pairs = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(30)]
    parquet.write_table(Table.from_pylist(pairs), folder / "a.parquet")
    chats = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "word " * (1 + i)}]}
        for i in range(20)
    ]
    lines = [json.dumps(chat) for chat in chats] + ["nonsense", json.dumps({"messages": []}), json.dumps(chats[0])]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")


def test_check_as_json_reconciles(tmp_path):
    write_mixed(tmp_path / "mixed")
    ran = phinetune("data", "check", tmp_path / "mixed", "max_rejected=0.5", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    train = json.loads(ran.stdout)["train"]
    assert (train["rows"], train["used"], train["rejected"]) == (53, 51, 2)
    assert train["formats"] == {"pairs": 30, "messages": 21}
    assert sum(b["examples"] for b in train["histogram"]) == train["examples"] == 51
    assert train["tokens"] == sum(train["tokens_by_part"].values())
    assert train["findings"]["duplicate"]["rows"] == 1
    assert {place.rpartition("/")[2].split()[0] for r in train["reasons"].values() for place in r["first"]} == {
        "b.jsonl:21",
        "b.jsonl:22",
    }


def test_check_for_a_person_says_what_a_run_would_refuse(tmp_path):
    write_mixed(tmp_path / "mixed")
    ran = phinetune("data", "check", tmp_path / "mixed")
    assert ran.returncode == 2
    assert re.search(r"rows +53 +30 pairs, 21 messages", ran.stdout)
    assert "is not valid JSON" in ran.stdout
    assert "stand in the data before" in ran.stdout
    assert "█" in ran.stdout
    assert re.fullmatch(r"error: .*mixed.*: 3\.8% of 53 rows can't be used: .*; correct .*\n", ran.stderr)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(
    ("name", "rows", "used"), [("alpaca_en_demo.json", 999, 999), ("glaive_toolcall_en_demo.json", 300, 108)]
)
def test_check_on_the_real_files(name, rows, used):
    """SmolLM2's template knows no tools, so rows with tools are left out, with the reason."""
    ran = phinetune("data", "check", SHARED_DATA / name, "--json")
    train = json.loads(ran.stdout)["train"]
    assert (train["rows"], train["used"], train["rejected"]) == (rows, used, rows - used)
    if used < rows:
        assert ran.returncode == 2
        assert {reason: counted["rows"] for reason, counted in train["reasons"].items()} == {
            "the chat template does not write the tools": 191,
            "has N tokens, above data.max_length=N": 1,
        }


def test_large_data_is_read_whole_and_a_share_of_its_rows_tokenised(tmp_path, monkeypatch, smollm2_tokenizer):
    chats = [
        {"messages": [
            {"role": "user", "content": f"Say {i}"},
            {"role": "assistant", "content": "word " * (100 if i % 4 == 0 else 1 + i % 7)},
        ]}
        for i in range(400)
    ]  # fmt: skip
    lines = [*map(json.dumps, chats), "nonsense"]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    (tmp_path / "backwards.jsonl").write_text("\n".join(reversed(lines)))
    size = (tmp_path / "chats.jsonl").stat().st_size
    monkeypatch.setattr("phinetune.data.check.TOKENISED_BYTES", size // 4 + 1)  # so one row in four
    monkeypatch.setattr("phinetune.cli.quiet.quiet_libraries", lambda: None)  # it would last

    def checked(name, *options):
        ran = CliRunner().invoke(app, ["data", "check", str(tmp_path / name), "max_length=90", *options])
        return ran.stdout, ran.exit_code

    def counts(name, *options):
        said, _ = checked(name, "max_rejected=0.9", "--json", *options)
        return json.loads(said)["train"]

    every, some = counts("chats.jsonl", "--every-row"), counts("chats.jsonl")
    whole = [len(smollm2_tokenizer.apply_chat_template(chat["messages"], return_dict=False)) for chat in chats]
    assert (every["rows"], every["used"], every["tokenised"]) == (401, 300, 400)
    assert every["tokens"] == sum(size for size in whole if size <= 90)
    assert every["share_lost"] == pytest.approx(101 / 401)
    assert some["rows"] == 401
    assert "chats.jsonl:401 is not valid JSON" in str(some["reasons"]), "what isn't drawn is read, too"
    assert 60 < some["tokenised"] < 140
    assert some["tokens"] == pytest.approx(every["tokens"] / 4, rel=0.3)
    assert some["share_lost"] == pytest.approx(101 / 401, abs=0.1)
    backwards = counts("backwards.jsonl")
    assert [backwards[key] for key in ("tokenised", "tokens")] == [some[key] for key in ("tokenised", "tokens")]

    said, code = checked("chats.jsonl")
    assert f"below, of {some['tokenised']} rows drawn from all (--every-row tokenises every one)" in said
    assert code != 0, "a quarter of the rows is too long"
    assert "drawn from all" not in checked("chats.jsonl", "--every-row")[0]


def test_preview_shows_what_is_learnt(tmp_path):
    chats = json.dumps(
        {"messages": [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Hello 😀."}]}
    )
    ran = phinetune("data", "preview", "-", input=chats + "\n" + "nonsense\n")
    assert ran.returncode == 0, ran.stderr
    assert "<|im_start|>assistant\n⟦Hello 😀.<|im_end|>⟧" in ran.stdout
    assert "stdin:2  left out: is not valid JSON" in ran.stdout
    ids = phinetune("data", "preview", "-", "--ids", "--count", 1, input=chats).stdout
    assert re.search(r"^\+ +2  '<\|im_end\|>'$", ids, re.MULTILINE)
    page = tmp_path / "page.html"
    ran = phinetune("data", "preview", "-", "--html", page, input=chats)
    assert ran.returncode == 0, ran.stderr
    text = page.read_text()
    assert '<span class="l">Hello</span>' in text
    assert '<span class="l c">&lt;|im_end|&gt;</span>' in text
    assert "Hi &lt;b&gt;" in text.replace("</span>", "").replace('<span class="l">', "")
    assert "http" not in text, "nothing is asked for from elsewhere"


def test_faults_are_one_line():
    for arguments, what in (
        (("check", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("check", "chats.jsonl", "max_lenght=3"), "unknown name data.max_lenght (did you mean max_length?)"),
        (("preview", "phinetune:orders/train", "--row", 10**6), "has no row 1000000"),
    ):
        ran = phinetune("data", *arguments)
        assert ran.returncode == 2
        assert what in ran.stderr
        assert ran.stderr.count("\n") == 1


def test_another_template_is_refused_unless_told(tmp_path, chats, tiny_llama_folder):
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama_folder}\ndata: {{train: {chats}, eval: 0.1}}\n"
        f"training_config: {{output_dir: {run}, max_steps: 2}}\npeft_config: {{r: 2}}\n"
    )
    ran = phinetune("train", recipe)
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads((run / "chat_format.json").read_text())) == {"template", "tokenizer"}
    (checkpoint,) = run.glob("checkpoint-*")
    assert (checkpoint / "chat_format.json").read_text() == (run / "chat_format.json").read_text()
    template = run / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text())
    for verb in (("evaluate", run, "--no-answers", "--data", chats), ("chat", run, "-p", "Hi", "--max-new-tokens", 2)):
        ran = phinetune(*verb)
        assert ran.returncode == 2, ran.stdout
        assert "was tuned with another chat template than the tokenizer at hand has" in ran.stderr
    assert phinetune("evaluate", run, "--no-answers", "--data", chats, "--allow-template-mismatch").returncode == 0


def test_preview_shows_words_as_they_are(tmp_path):
    said = "x = [i for i in y] [/INST] [b]bold[/b] :warning: list[int]"
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}]})
    )
    shown = phinetune("data", "preview", path)
    assert shown.returncode == 0, shown.stderr
    assert f"user\n{said}<|im_end|>" in shown.stdout
    assert f"⟦{said}<|im_end|>⟧" in shown.stdout
