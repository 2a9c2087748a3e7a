"""An example token by token: the text of each, whether it is learnt, whether it is a control token."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.data.example import Example
from phinetune.data.formats import Rejected
from phinetune.data.policies import check
from phinetune.data.readers import chunks, rows
from phinetune.data.sources import open_sources
from phinetune.data.worker import Task
from phinetune.recipe import DataConfig


@dataclass(frozen=True)
class Token:
    """`text` is what it adds to what was decoded before: nothing for the first bytes of a character."""

    id: int
    text: str
    learnt: bool
    control: bool


def previewed(config: DataConfig, tokenizer: Any, first: int, count: int) -> Iterator[list[Example] | Rejected]:
    """What rows `first` to `first + count` of `data.train` become, from 1; nothing behind them is read."""
    from phinetune.data.prepare import task_of

    with open_sources(config.train) as files:
        task: Task = task_of(files, tokenizer, config)
        renderer = task.renderer()
        number = 0
        for index, file in enumerate(task.files):
            for chunk in chunks(file, index):
                for _, row in rows(chunk, file):
                    number += 1
                    if number < first:
                        continue
                    checked = row if isinstance(row, Rejected) else check(row, config)
                    outcome = checked if isinstance(checked, Rejected) else renderer.render(checked[0])
                    yield outcome if isinstance(outcome, Rejected) else outcome.examples
                    if number >= first + count - 1:
                        return


def tokens_of(example: Example, tokenizer: Any) -> list[Token]:
    """The tokens of an example, as the model sees them."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    tokens = []
    for id, learnt in zip(example.ids.tolist(), example.mask.tolist(), strict=True):
        text = stream.step(tokenizer.backend_tokenizer, id) or ""
        tokens.append(Token(id, text, learnt, id in added and bool(str(added[id]).strip())))
    return tokens


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; font-family: ui-monospace, monospace; margin-top: 2rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace;
  border: 1px solid light-dark(#d5d5d5, #444); border-radius: 6px; padding: 1rem; }}
.l {{ background: light-dark(#cdeccd, #1d4d2b); }}
.c {{ color: light-dark(#a01818, #ff9a8d); font-weight: 600; }}
.r {{ color: light-dark(#a01818, #ff9a8d); }}
small {{ color: light-dark(#666, #aaa); }} sub {{ font-size: 9px; color: light-dark(#666, #aaa); }}
</style></head><body>
<h1>{title}</h1>
<p><span class="l">green: learnt</span> · plain: read, not learnt · <span class="c">red: control tokens</span></p>
{rows}
</body></html>
"""


def as_html(title: str, shown: Sequence[tuple[str, list[Token] | str]], ids: bool = False) -> str:
    """A page of its own: (where, tokens or the reason why there are none) of each row."""
    parts = []
    for where, tokens in shown:
        parts.append(f"<h2>{html.escape(where)}</h2>")
        if isinstance(tokens, str):
            parts.append(f'<p class="r">left out: {html.escape(tokens)}</p>')
            continue
        learnt = sum(token.learnt for token in tokens)
        parts.append(f"<small>{len(tokens):,} tokens, {learnt:,} learnt</small><pre>")
        for token in tokens:
            classes = " ".join(name for name, on in (("l", token.learnt), ("c", token.control)) if on)
            text = html.escape(token.text)
            number = f"<sub>{token.id}</sub>" if ids else ""
            parts.append(f'<span class="{classes}">{text}{number}</span>' if classes else text + number)
        parts.append("</pre>")
    return PAGE.format(title=html.escape(title), rows="".join(parts))
