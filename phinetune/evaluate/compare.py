"""Base against tuned on the same held-out rows: one model, its adapters off and on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from phinetune import lora
from phinetune.data import Example, Row
from phinetune.evaluate.loss import evaluate_loss
from phinetune.generate import answers
from phinetune.recipe import EvaluationConfig


@dataclass(frozen=True)
class Answer:
    """What was asked, what should have come, and what base and tuned model said."""

    question: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """`base` and `tuned` hold `eval_loss`, `perplexity` and the metrics asked for."""

    base: dict[str, float]
    tuned: dict[str, float]
    eval_rows: int
    answers: list[Answer]

    def summary(self) -> dict[str, Any]:
        return {"base": self.base, "tuned": self.tuned, "eval_rows": self.eval_rows}


def compare(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    rows: Sequence[Row],
    config: EvaluationConfig,
    max_batch_tokens: int,
    batch_size: int,
    on_progress: Callable[[str, int], None] = lambda who, done: None,
) -> Comparison:
    """Measures an adapted model without its adapters, then with them folded in."""
    measured: dict[str, dict[str, float]] = {}
    rows = [row for row in rows if _last_answer(row) > 0]  # an answer to nothing can't be asked for
    said: dict[str, list[str]] = {"base": [""] * len(rows), "tuned": [""] * len(rows)}
    expected = [row.messages[_last_answer(row)]["content"] for row in rows]
    was_training = model.training
    model.eval()
    modes: dict[str, AbstractContextManager[None]] = {"base": lora.disabled(model), "tuned": lora.fused(model)}
    for who, mode in modes.items():
        with mode:
            measured[who] = evaluate_loss(model, examples, max_batch_tokens)
            if config.metrics and rows:
                asked = [row.messages[: _last_answer(row)] for row in rows]

                def tell(done: int, who: str = who) -> None:
                    on_progress(who, done)

                said[who] = answers(model, tokenizer, asked, config.max_new_tokens, batch_size, tell)
                measured[who]["exact_match"] = exact_match(said[who], expected)
    model.train(was_training)
    questions = [row.messages[_last_answer(row) - 1]["content"] for row in rows]
    triples = zip(questions, expected, said["base"], said["tuned"], strict=True)
    return Comparison(measured["base"], measured["tuned"], len(examples), [Answer(*t) for t in triples])


def exact_match(said: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that equal what was expected, white space at the ends aside."""
    return sum(a.strip() == b.strip() for a, b in zip(said, expected, strict=True)) / len(expected)


def _last_answer(row: Row) -> int:
    """The place of the last assistant message; what stands before it is the question."""
    return max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
