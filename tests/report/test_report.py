"""report.html: its numbers are the files', it asks nobody for anything, and nothing in it is code."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import pytest
from commands import phinetune as command

import phinetune
from phinetune.errors import InputError
from phinetune.report import charts, read_run, write_comparison, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>document.title='evil'</script><img src=x onerror=alert(1)>"


class Tables(HTMLParser):
    """{id: rows of cells' text}, and every address that the page would ask."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.asked, self.scripts = {}, [], 0
        self._rows = self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.scripts += tag == "script" or any(name.startswith("on") for name in given)
        self.asked += [v for k, v in given.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag == "table":
            self._rows = self.tables.setdefault(given.get("id"), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join(self._cell.split()))
            self._cell = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama_folder):
    """A run whose questions, system message and path would like to be code."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{EVIL} {i}"},
                {"role": "assistant", "content": f"Number {i}" + " more" * (i % 5)},
            ]
        }
        for i in range(30)
    ]
    run(folder / "one", tiny_llama_folder, rows, 1e-3)
    run(folder / "two", tiny_llama_folder, rows, 2e-3)
    return folder


def run(folder, model, rows, learning_rate):
    phinetune.finetune(
        model=str(model),
        train=rows,
        eval=0.2,
        training_config={
            "output_dir": str(folder), "max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
            "learning_rate": learning_rate, "use_cpu": True, "save_strategy": "no",
        },
        peft_config={"r": 2},
        evaluation={"metrics": ["exact_match", "rougeL"], "max_new_tokens": 4},
    )  # fmt: skip


def test_its_numbers_are_those_of_the_files(folder):
    page = Tables((folder / "one" / "report.html").read_text())
    names, *lines = page.tables["metrics"]
    shown = [{n: json.loads(cell) for n, cell in zip(names, line, strict=True) if cell} for line in lines]
    assert shown == [json.loads(line) for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    assert len(shown) == 6

    summary = json.loads((folder / "one" / "summary.json").read_text())
    results = {row[0]: row[1:] for row in page.tables["results"][1:]}
    assert set(results) == {"eval_loss", "perplexity", "exact_match", "rougeL"}
    for name, (base, tuned, _) in results.items():
        assert float(base.replace(",", "")) == pytest.approx(summary["base"][name], rel=1e-3)
        assert float(tuned.replace(",", "")) == pytest.approx(summary["tuned"][name], rel=1e-3)
    low, high = map(float, results["rougeL"][2].split(" to "))
    assert [low, high] == pytest.approx(summary["confidence_95"]["rougeL"]["difference"], rel=1e-3)

    ledger = json.loads((folder / "one" / "ledger.json").read_text())
    assert page.tables["ledger"][1][1:5] == [
        str(ledger["train"][key]) for key in ("rows", "used", "rejected", "held_out")
    ]
    assert sum(bin["examples"] for bin in ledger["train"]["histogram"]) == ledger["train"]["used"]
    origins = {row[0]: row[1:] for row in page.tables["settings"]}
    assert origins["training_config.learning_rate"] == ["0.001", "Python"]
    assert origins["model_kwargs.dtype"][1].startswith("derived from this machine")


def test_nothing_in_it_is_code_or_asked_from_elsewhere(folder):
    page = Tables((folder / "one" / "report.html").read_text())
    assert (page.scripts, page.asked) == (0, [])
    assert any("<script>" in cell for row in page.tables[None] for cell in row), "the questions stand in it, as text"


def test_curves_are_of_the_logged_values(folder):
    """The line's points in the SVG, an affine image of (step, loss)."""
    text = (folder / "one" / "report.html").read_text()
    line = re.search(r'<path d="([^"]*)"[^>]*stroke: #3b7dd8', text)[1]
    drawn = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", line)]
    steps, losses = read_run(folder / "one").series("loss")
    assert len(drawn) == len(steps)
    for pixels, values in zip(zip(*drawn, strict=True), (steps, losses), strict=True):
        scale = (pixels[-1] - pixels[0]) / (values[-1] - values[0])
        assert [pixels[0] + scale * (v - values[0]) for v in values] == pytest.approx(pixels, abs=0.01)


def test_a_run_that_goes_on_has_a_report_and_a_comparison_names_what_differs(folder, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(folder / "one", cut)
    for name in ("summary.json", "answers.jsonl", "report.html"):
        (cut / name).unlink()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    text = write_report(cut).read_text()
    assert "not finished" in text
    assert len(Tables(text).tables["metrics"]) == 7

    write_comparison([folder / "one", folder / "two", cut], tmp_path / "all.html")
    page = Tables((tmp_path / "all.html").read_text())
    assert page.tables["settings"][0] == ["setting", "one", "two", "cut"]
    assert {row[0] for row in page.tables["settings"][1:]} == {
        "training_config.output_dir", "training_config.learning_rate", "training_config.logging_dir",
        "training_config.run_name",
    }  # fmt: skip
    results = {row[0]: row[1:] for row in page.tables["results"]}
    assert results["eval_loss"][2] == "–"


def test_from_the_command_line(folder, tmp_path):
    (folder / "two" / "report.html").unlink()
    assert command("report", folder / "two").stdout == f"wrote {folder / 'two' / 'report.html'}\n"
    both = ["report", folder / "one", folder / "two", "-o", tmp_path / "both.html"]
    assert command(*both).returncode == 0
    again = command(*both)
    assert (again.returncode, again.stderr) == (
        2,
        f"error: {tmp_path / 'both.html'}: is there already; give another --output, or --overwrite\n",
    )
    nowhere = command("report", tmp_path)
    assert (nowhere.returncode, nowhere.stderr) == (
        2,
        f"error: {tmp_path}: holds no run of phinetune's; give the output folder of a run\n",
    )


@pytest.mark.parametrize("content", ["[1, 2]\n", "nonsense\n", "[" * 100_000 + "\n"])
def test_files_that_are_no_runs_are_refused(folder, tmp_path, content):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder / "one", spoilt)
    (spoilt / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_report(spoilt)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"tuned": [1]}'),
        ("summary.json", '{"tuned": {"eval_loss": "low"}, "base": 3}'),
        ("ledger.json", '{"train": 5}'),
        ("ledger.json", '{"train": {"histogram": [{"from": "a"}]}}'),
        ("run.json", '{"settings": [{"path": 1}]}'),
        ("answers.jsonl", '{"question": 1}\n'),
    ],
)
def test_files_of_another_form_are_an_error(folder, tmp_path, name, content):
    run = tmp_path / "run"
    shutil.copytree(folder / "one", run)
    (run / name).write_text(content)
    with pytest.raises(InputError, match="holds something else than a run writes"):
        write_report(run)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(folder, tmp_path):
    log = tmp_path / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom",
        (folder / "one" / "report.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    assert "<title>one</title>" in shown.stdout, "no script has run"
    page = Tables(shown.stdout)
    assert page.tables["metrics"] == Tables((folder / "one" / "report.html").read_text()).tables["metrics"]
    assert shown.stdout.count("<svg") == 6
    page_requests = re.findall(r'"url":"(https?://[^"]*)"', log.read_text())
    own = [url for url in page_requests if not re.search(r"//[\w.-]*\.(google|gvt1|googleapis)\.com/", url)]
    assert own == []


def test_nobodys_settings_of_matplotlib_decide():
    def drawn():
        series = [charts.Series("one", [1, 2, 3], [3.0, 2.0, 1.0]), charts.Series("two", [1, 2], [2.0, 1.0])]
        return charts.curves("Loss", "nats", series), charts.bars("Lengths", "rows", [(0, 3, 2), (4, 7, 1)], "tokens")

    plain, before = drawn(), dict(matplotlib.rcParams)
    settings = {"text.usetex": True, "axes.facecolor": "red", "axes.prop_cycle": "cycler('color', ['r'])"}
    with matplotlib.rc_context(settings):  # LaTeX is on few machines
        assert drawn() == plain
        assert matplotlib.rcParams["text.usetex"]
    assert dict(matplotlib.rcParams) == before


def test_an_answer_that_is_half_a_sign_comes_into_the_report(folder, tmp_path):
    run = shutil.copytree(folder / "one", tmp_path / "run")
    lines = (run / "answers.jsonl").read_text().splitlines(keepends=True)
    first = {**json.loads(lines[0]), "tuned": "half \ud83d of a sign"}
    (run / "answers.jsonl").write_text("".join([json.dumps(first) + "\n", *lines[1:]]))
    assert "half \\ud83d of a sign" in write_report(run).read_text(encoding="utf-8")


def test_a_page_in_a_folder_that_is_not_there(folder, tmp_path):
    page = tmp_path / "pages" / "both.html"
    refused = command("report", folder / "one", folder / "two", "-o", page)
    said = f"error: {page}: the folder {page.parent} isn't there; make the folder, or give another path\n"
    assert (refused.returncode, refused.stderr) == (2, said)
    refused = command("report", tmp_path / "nowhere", "-o", tmp_path)
    assert (refused.returncode, refused.stderr) == (2, f"error: {tmp_path}: is a folder; give the path of a file\n")
