"""The `phinetune` command. Heavy imports happen inside the verbs, so that `--help` answers at once."""

import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

import phinetune
from phinetune.errors import PhinetuneError

app = typer.Typer(
    help="Fine-tune Phi-3 and its relatives with LoRA, on the machine you have.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer carries click's exceptions, under its own name or click's by its version.
UsageError: Any = typer.BadParameter.__bases__[0]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
AnyTemplate = Annotated[
    bool, typer.Option("--allow-template-mismatch", help="Even with another chat template than it was tuned with.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Empty an output folder that holds an earlier run.")]


def main() -> None:
    """Runs the command line; a fault of the user's is one line on standard error, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sign that a terminal lacks is spelt out, as on standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
    except PhinetuneError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except UsageError as error:
        where, what = error.ctx.command_path if error.ctx else "phinetune", error.format_message()
        if what:  # else a verb without its own has shown its help
            _say(f"error: {where}: {what}; see `{where} --help`")
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        _say("stopped by SIGINT")
        code = 130
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        where = error.filename or "phinetune"
        _say(f"error: {where}: {error.strerror or error}; make room or give another path")
        code = 1
    except (RuntimeError, MemoryError) as error:
        from phinetune.kernels.allocator import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        _say(f"error: memory: was refused ({said}); `phinetune plan` says what needs less")
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one that comes now ends the process without a traceback
    sys.exit(code)


def _say(line: str) -> None:
    """On standard error, where somebody still reads it."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(phinetune.__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the run is written.")] = Path("runs/demo"),
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune the embedded model on the shipped example and show before and after."""
    from phinetune.cli.demo import run_demo

    run_demo(output_dir, seed, overwrite)


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Your chats, in any format that `data check` reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="Model to tune; chosen by the machine's memory by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is there.")] = False,
) -> None:
    """Look at your data and this machine, and write a commented recipe."""
    from phinetune.cli.init import write_recipe

    write_recipe(data, output, model, overwrite)


data_app = typer.Typer(help="Look at your data as training will.", no_args_is_help=True)
app.add_typer(data_app, name="data")
What = Annotated[list[str], typer.Argument(help="A recipe, or data: files, folders, a Hub id, -; and key=value.")]
ForModel = Annotated[
    str | None, typer.Option("--model", help="Whose tokenizer and template; else a recipe's own, or smollm2.")
]


@data_app.command("check")
def data_check(
    what: What,
    model: ForModel = None,
    every_row: Annotated[bool, typer.Option("--every-row", help="Tokenise every row of large data, too.")] = False,
    json: Json = False,
) -> None:
    """Read every row: what can be used and what not, tokens, lengths, findings."""
    from phinetune.cli.data import run_check

    run_check(what, model, every_row, json)


@data_app.command("preview")
def data_preview(
    what: What,
    model: ForModel = None,
    row: Annotated[int, typer.Option(min=1, help="The first row to show.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="A token a line, with its id.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page in place of the screen.")] = None,
) -> None:
    """Show rows token by token: what is learnt, what is only read, where control tokens stand."""
    from phinetune.cli.data import run_preview

    run_preview(what, model, row, count, ids, html)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value settings over the recipe's; with --resume also a checkpoint.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, or the one named.")
    ] = False,
    overwrite: Overwrite = False,
    rehearsal: Annotated[
        bool, typer.Option("--rehearsal/--no-rehearsal", help="Try everything once, with the longest rows, at first.")
    ] = True,
) -> None:
    """Fine-tune as a recipe says."""
    from phinetune.cli.train import run_train

    run_train(recipe, overrides or [], resume, overwrite, rehearsal)


@app.command("verify-resume")
def verify_resume(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings over the recipe's.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the step at which it is killed; another each time by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Kill a short run of a recipe, resume it, and compare it with one that ran through."""
    from phinetune.cli.verify import run_verify_resume

    run_verify_resume(recipe, overrides or [], seed, json)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings over the recipe's.")] = None,
    device: Annotated[
        str | None, typer.Option(help="A GPU such as rtx4090, or memory such as 16GB; this machine by default.")
    ] = None,
    json: Json = False,
) -> None:
    """What a run will need: memory by its parts, time, disk; whether it fits, and what to change if it doesn't."""
    from phinetune.cli.plan import run_plan

    run_plan(recipe, overrides or [], device, json)


@app.command()
def explain(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings over the recipe's.")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what isn't at its default.")] = False,
    json: Json = False,
) -> None:
    """Every setting of a recipe: its value, where that came from, and what it does."""
    from phinetune.cli.explain import run_explain

    run_explain(recipe, overrides or [], changed, json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's output folder, a checkpoint, or another adapter folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value over the recipe's evaluation section: do_sample=true temperature=0.7 …"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Held-out chats; the run's own by default.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens an answer may have; as the run's recipe says by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of answers that are drawn.")] = 42,
    answers: Annotated[bool, typer.Option("--answers/--no-answers", help="Also generate, and measure that.")] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="exact_match, rouge1, rouge2, rougeL, rougeLsum, bleu, chrf, json_valid, json_fields or "
            "FILE.py:NAME; may be given several times."
        ),
    ] = None,
    allow_template_mismatch: AnyTemplate = False,
    json: Json = False,
) -> None:
    """Measure base and tuned model on held-out chats: loss, perplexity, and metrics of their answers."""
    from phinetune.cli.evaluate import run_evaluate

    settings = [*(overrides or []), *([f"max_new_tokens={max_new_tokens}"] if max_new_tokens else [])]
    run_evaluate(run, settings, data, answers, metric or [], seed, allow_template_mismatch, json)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run's output folder, a checkpoint, or another adapter folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new folder; RUN-merged by default.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the base's own), bfloat16, float16 or float32: what is rounded to, once.")
    ] = "auto",
    onto: Annotated[
        str, typer.Option(help="Of a 4-bit run: base, dequantised, or auto, the better one by the held-out loss.")
    ] = "auto",
    data: Annotated[str | None, typer.Option(help="Held-out chats for that; the run's own by default.")] = None,
    allow_template_mismatch: AnyTemplate = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merged model that is there.")] = False,
) -> None:
    """Fold an adapter into its base: a folder that plain transformers loads."""
    from phinetune.cli.merge import run_merge

    run_merge(run, output, dtype, onto, data, allow_template_mismatch, overwrite)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run's output folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    merged: Annotated[Path | None, typer.Option(help="Push this merged model of the run, not its adapter.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    token: Annotated[str | None, typer.Option(help="Access token; HF_TOKEN by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the model card and what would go; push nothing.")
    ] = False,
) -> None:
    """Put an adapter, or a merged model, on the Hub with a model card filled from the run."""
    from phinetune.cli.push import run_push

    run_push(run, repository, merged, private, token, dry_run)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Of several: the page to write; comparison.html by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page that is there.")] = False,
) -> None:
    """Write a run's report.html again, or one page that compares several."""
    from phinetune.cli.report import run_report

    run_report(runs, output, overwrite)


@app.command()
def doctor(
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Also train a little, for its speed.")
    ] = True,
    json: Json = False,
) -> None:
    """Say what this machine is, how it is used, and how much of its speed training reaches."""
    from phinetune.cli.doctor import run_doctor

    run_doctor(training, json)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run's output folder, an adapter folder, or a model.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one thing and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned model side by side.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    allow_template_mismatch: AnyTemplate = False,
) -> None:
    """Talk to a tuned model."""
    from phinetune.cli.chat import run_chat

    run_chat(run, prompt, system, compare, max_new_tokens, temperature, allow_template_mismatch)
