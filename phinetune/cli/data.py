"""`phinetune data check` and `phinetune data preview`"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phinetune.cli.paths import check_output, existing
from phinetune.errors import DataError, RecipeError
from phinetune.recipe import Recipe, apply_override, load_recipe, make_recipe

WIDTH = 40  # of a histogram's longest bar


def run_check(what: Sequence[str], model: str | None, every_row: bool, as_json: bool) -> None:
    recipe, tokenizer = _asked(what, model)

    from phinetune.data.check import check_data

    with _rows_counted(shown=not as_json) as advance:
        checked = check_data(recipe.data, tokenizer, recipe.training_config.seed_of_rows, every_row, advance)
    if as_json:
        print(json.dumps({"model": recipe.model, **{name: source.summary() for name, source in checked.items()}}))
    else:
        for name, source in checked.items():
            _print(name, source, recipe)
    for source in checked.values():
        ledger = source.ledger
        if source.refused:
            raise source.refused[0]
        if source.share_lost > recipe.data.max_rejected:
            what_is = f"{source.share_lost:.1%} of {ledger.rows:,} rows can't be used: a run would refuse this data"
            raise DataError(ledger.source, what_is, "correct these rows, or raise data.max_rejected")
        if not ledger.used:
            what_is = f"none of {ledger.rows:,} rows is left to train on: a run would refuse this data"
            raise DataError(ledger.source, what_is, "correct these rows, or see what is left out above")


def run_preview(what: Sequence[str], model: str | None, row: int, count: int, ids: bool, page: Path | None) -> None:
    if page is not None:
        check_output(page)
    recipe, tokenizer = _asked(what, model)

    from phinetune.data import Rejected
    from phinetune.data.preview import as_html, previewed, tokens_of

    shown: list[tuple[str, Any]] = []
    for outcome in previewed(recipe.data, tokenizer, row, count):
        if isinstance(outcome, Rejected):
            shown.append((outcome.where, outcome.reason))
        else:
            shown += [(example.where, tokens_of(example, tokenizer)) for example in outcome]
    if not shown:
        raise DataError(str(recipe.data.train), f"has no row {row}", "give a smaller --row")
    if page is not None:
        title = f"What {recipe.model} learns"
        page.write_text(as_html(title, shown, ids), encoding="utf-8")
        print(f"wrote {page}: {len(shown)} examples")
        return
    _print_tokens(shown, ids)


def _asked(what: Sequence[str], model: str | None) -> tuple[Recipe, Any]:
    """The recipe that is meant, by its file or by the data's, and its tokenizer."""
    settings = [item for item in what if "=" in item and existing(item) is None]
    items = [item for item in what if item not in settings]
    recipes = [item for item in items if item.endswith((".yaml", ".yml"))]
    if len(recipes) > 1 or (recipes and len(items) > 1):
        raise RecipeError(" ".join(items), "is more than one thing to look at", "give one recipe, or data alone")
    if recipes:
        settings += [f"model={json.dumps(model, ensure_ascii=False)}"] if model else []
        recipe, words = load_recipe(recipes[0], settings)
    else:
        if not items:
            raise RecipeError("data", "nothing to look at", "give a recipe, files, folders, a Hub id or -")
        given: dict[str, Any] = {"model": model or "smollm2", "data": {"train": items, "max_length": 4096}}
        for setting in settings:
            apply_override(given, setting if "." in setting.partition("=")[0] else f"data.{setting}")
        recipe, words = make_recipe(given, where="data")

    from phinetune.cli.quiet import quiet_libraries
    from phinetune.model.load import load_tokenizer

    quiet_libraries()
    for word in words:
        print(word, file=sys.stderr)
    return recipe, load_tokenizer(recipe.model, recipe.model_kwargs, recipe.tokenizer_kwargs)


def _print(name: str, source: Any, recipe: Recipe) -> None:
    ledger = source.ledger
    speed = f"{source.bytes / 1e6:,.1f} MB in {source.seconds:.1f} s"
    formats = ", ".join(f"{count:,} {format}" for format, count in ledger.formats.items())
    print(f"\n{name}: {ledger.source}  ({speed})")
    print(f"  rows        {ledger.rows:>12,}   {formats}")
    print(f"  can be used {ledger.used:>12,}   {ledger.used / ledger.rows:.1%}")
    if ledger.held_out:
        print(f"  held out    {ledger.held_out:>12,}")
    print(f"  rejected    {ledger.rejected:>12,}")
    for words, count in ledger.dropped.items():
        print(f"  left out    {count:>12,}   rows that {words}")
    if ledger.examples != source.drawn - source.lost:
        print(f"  examples    {ledger.examples:>12,}")
    if source.one_in > 1:
        print(f"  below, of {source.drawn:,} rows drawn from all (--every-row tokenises every one):")
    print(f"  tokens      {ledger.tokens:>12,}   by {recipe.model}'s tokenizer and chat template")
    for part, count in ledger.parts.items():
        if count:
            print(f"    {part:10}{count:>12,}   {count / ledger.tokens:.1%}")
    if ledger.tokens:
        print(f"  learnt      {ledger.supervised:>12,}   {ledger.supervised / ledger.tokens:.1%}")
    _print_histogram(source, recipe.data.max_length)
    if source.reasons:
        print("\n  rejected rows")
        for reason, (count, places) in source.reasons.items():
            print(f"    {count:>10,}  {reason}")
            for place in places:
                print(f"                {_short(place)}")
    if ledger.findings:
        print("\n  worth knowing")
        for finding, (count, places) in ledger.findings.items():
            print(f"    {count:>10,}  rows {finding.words}" + (f"  ({', '.join(places)})" if places else ""))


def _print_histogram(source: Any, max_length: int) -> None:
    bins = source.ledger.histogram
    if not bins:
        return
    print(f"\n  tokens of an example (data.max_length={max_length:,}, the longest has {source.ledger.longest:,})")
    most = max(count for *_, count in bins)
    for begin, end, count in bins:
        bar = "█" * max(round(WIDTH * count / most), 1 if count else 0)
        print(f"    {begin:>7,} – {end:>7,} {count:>10,}  {bar}")


@contextmanager
def _rows_counted(shown: bool) -> Iterator[Callable[[int], None]]:
    """A line on standard error with the rows done so far, on a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not shown or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("rows checked", total=None)
        yield lambda done: progress.advance(task, done)


def _print_tokens(shown: Sequence[tuple[str, Any]], ids: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    legend = "⟦learnt⟧" if not console.is_terminal else ""
    console.print(legend or Text.assemble(("learnt", "black on green"), "   ", ("control token", "bold red")))
    for where, tokens in shown:
        console.print()
        if isinstance(tokens, str):
            console.print(Text.assemble((where, "bold"), f"  left out: {tokens}"))
            continue
        learnt = sum(token.learnt for token in tokens)
        console.print(Text.assemble((where, "bold"), f"  {len(tokens):,} tokens, {learnt:,} learnt"))
        line = Text()
        styles = {(1, 1): "bold red on green", (1, 0): "black on green", (0, 1): "bold red", (0, 0): ""}
        for token in tokens:
            style = styles[token.learnt, token.control]
            if ids:
                mark = "+" if token.learnt else " "
                line.append(f"{mark}{token.id:>7}  {token.text!r}\n", style)
            else:
                line.append(token.text, style)
        console.print(line if ids or console.is_terminal else Text(_bracketed(tokens)))


def _bracketed(tokens: Sequence[Any]) -> str:
    """For where there are no colours: what is learnt stands in ⟦ ⟧."""
    runs = itertools.groupby(tokens, key=lambda token: token.learnt)
    texts = [(learnt, "".join(token.text for token in run)) for learnt, run in runs]
    return "".join(f"⟦{text}⟧" if learnt else text for learnt, text in texts)


def _short(text: str, width: int = 110) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
