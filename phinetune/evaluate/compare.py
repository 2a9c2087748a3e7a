"""Base against tuned on the same held-out rows: one model, its adapters off and on."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from phinetune import lora
from phinetune.data import Example, Renderer, Row
from phinetune.evaluate.loss import RowLosses, evaluate_rows
from phinetune.evaluate.metrics import Measured, measure, measure_loss
from phinetune.generate import answers
from phinetune.recipe import EvaluationConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What was asked (all of it, and the last message), what should have come, and what base and tuned model said."""

    messages: list[dict[str, Any]]
    question: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """`metrics` are `eval_loss`, `perplexity` and those asked for."""

    metrics: dict[str, Measured]
    eval_rows: int
    answers: list[Answer]

    @property
    def base(self) -> dict[str, float]:
        return {name: metric.base for name, metric in self.metrics.items()}

    @property
    def tuned(self) -> dict[str, float]:
        return {name: metric.tuned for name, metric in self.metrics.items()}

    def summary(self) -> dict[str, Any]:
        intervals = {
            name: {"base": [*m.base_interval], "tuned": [*m.tuned_interval], "difference": [*m.difference_interval]}
            for name, m in self.metrics.items()
        }
        return {"base": self.base, "tuned": self.tuned, "eval_rows": self.eval_rows, "confidence_95": intervals}


def compare(
    model: Any,
    tokenizer: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    rows: Sequence[Row],
    config: EvaluationConfig,
    max_batch_tokens: int,
    batch_size: int,
    on_progress: Callable[[str, int], None] = lambda who, done: None,
    fold: bool = True,
    seed: int = 0,
) -> Comparison:
    """Measures an adapted model without its adapters, then with them.

    `renderer` writes the prompts as it wrote what was trained on.  With `fold` answers come from merged weights, which
    is faster and takes a second copy of the adapted ones.  `seed` is that of drawn answers.
    """
    losses: dict[str, RowLosses] = {}
    asked = [turn for row in rows if (turn := renderer.last_answer(row))] if config.metrics else []
    if config.metrics and len(asked) < len(rows):
        log.warning(f"{len(rows) - len(asked):,} of {len(rows):,} held-out rows end with no answer to compare with")
    prompts, expected = [turn.prompt_ids for turn in asked], [turn.expected for turn in asked]
    said: dict[str, list[str]] = {"base": [""] * len(asked), "tuned": [""] * len(asked)}
    was_training = model.training
    model.eval()
    modes: dict[str, AbstractContextManager[None]] = {"base": lora.disabled(model), "tuned": nullcontext()}
    for who, mode in modes.items():

        def tell(done: int, who: str = who) -> None:
            on_progress(who, done)

        with mode:
            losses[who] = evaluate_rows(model, examples, max_batch_tokens)
            if asked:
                with lora.fused(model) if fold and who == "tuned" else nullcontext():
                    said[who] = answers(
                        model, tokenizer, prompts, config.max_new_tokens, batch_size, tell, config.sampling, seed
                    )
    model.train(was_training)
    metrics = measure_loss(losses["base"], losses["tuned"])
    metrics |= {name: measure(name, said["base"], said["tuned"], expected) for name in config.metrics if asked}
    found = [
        Answer(turn.messages, turn.messages[-1]["content"] or "", turn.expected, base, tuned)
        for turn, base, tuned in zip(asked, said["base"], said["tuned"], strict=True)
    ]
    return Comparison(metrics, len(rows), found)
