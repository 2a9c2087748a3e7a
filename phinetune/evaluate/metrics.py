"""What answers are measured by, each beside what should have come.

    exact_match                          the same, white space at the ends aside
    rouge1, rouge2, rougeL, rougeLsum    F1, with Porter's stemmer (rouge-score; Lin 2004)
    bleu, chrf                           of all answers together, 0 to 100 (sacrebleu; Papineni 2002, Popović 2015)
    json_valid                           JSON
    json_fields                          of the expected object's fields, the share that the answer has alike
    FILE.py:NAME                         a function of yours, (answer, expected) -> number

All but BLEU and chrF are the mean of a score for each answer.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phinetune.errors import RecipeError, RunError
from phinetune.evaluate.loss import RowLosses, perplexity

Scores = npt.NDArray[np.float64]
Score = Callable[[str, str], float]

RESAMPLES, SEED = 1000, 12345  # of the bootstrap (Efron 1979; of corpus metrics, Koehn 2004)
CONFIDENCE = 0.95
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CORPUS = {"bleu": "BLEU", "chrf": "CHRF"}  # by sacrebleu's name of the class
Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """A metric of base's and tuned answers to the same questions."""

    base: float
    tuned: float
    base_interval: Interval
    tuned_interval: Interval
    difference_interval: Interval
    """Of tuned − base, with both resampled alike."""


def check_metrics(metrics: Iterable[str]) -> None:
    """Raises RecipeError if a library or a function of the user's isn't there."""
    for metric in metrics:
        _corpus_score(metric) if metric in CORPUS else _score(metric)


def measure(metric: str, base: Sequence[str], tuned: Sequence[str], expected: Sequence[str]) -> Measured:
    """A metric of two models' answers, with 95 % confidence intervals over the questions.

    Raises:
        RecipeError: if a library or a function of the user's isn't there.
        RunError: if the user's function fails.
    """
    if metric in CORPUS:
        return _of_all_answers(metric, base, tuned, expected)
    score = _score(metric)
    of_base, of_tuned = (_scores(metric, score, said, expected) for said in (base, tuned))
    return Measured(
        float(of_base.mean()),
        float(of_tuned.mean()),
        bootstrap(of_base),
        bootstrap(of_tuned),
        bootstrap(of_tuned - of_base),
    )


def measure_loss(base: RowLosses, tuned: RowLosses) -> dict[str, Measured]:
    """`eval_loss` and `perplexity` of two models on the same rows, with intervals over the rows: each resample has the
    loss of its rows over the number of their supervised tokens."""
    tokens = np.array(base.tokens, np.float64)
    losses = np.array([base.losses, tuned.losses])
    generator, n = np.random.default_rng(SEED), len(tokens)
    drawn = [generator.integers(0, n, n) for _ in range(RESAMPLES)]
    means = np.array([losses[:, rows].sum(1) / tokens[rows].sum() for rows in drawn if tokens[rows].any()])
    found = {}
    for name, of in (("eval_loss", np.asarray), ("perplexity", np.vectorize(perplexity))):
        values = of(means)
        intervals = _middle(values[:, 0]), _middle(values[:, 1]), _middle(values[:, 1] - values[:, 0])
        found[name] = Measured(base.measured()[name], tuned.measured()[name], *intervals)
    return found


def bootstrap(scores: Scores, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The middle 95 % of the means of so many resamples."""
    generator, n = np.random.default_rng(seed), len(scores)
    return _middle(np.array([scores[generator.integers(0, n, n)].mean() for _ in range(resamples)]))


def _middle(of_resamples: Scores) -> Interval:
    low, high = np.quantile(of_resamples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _scores(metric: str, score: Score, said: Sequence[str], expected: Sequence[str]) -> Scores:
    scores = []
    for answer, should in zip(said, expected, strict=True):
        try:
            number = float(score(answer, should))
        except Exception as error:  # the user's own code may raise anything
            raise RunError(f"metric {metric}", f"fails on {answer[:80]!r} ({error})", "mend the function") from error
        if not math.isfinite(number):
            raise RunError(f"metric {metric}", f"gives {number} for {answer[:80]!r}", "give a finite number")
        scores.append(number)
    return np.array(scores)


def _score(metric: str) -> Score:
    """What an answer scores by a metric."""
    if metric in ROUGE:
        return _rouge(metric)
    if ":" in metric:
        return _users(metric)
    return {"exact_match": exact_match, "json_valid": json_valid, "json_fields": json_fields}[metric]


def exact_match(answer: str, expected: str) -> float:
    return float(answer.strip() == expected.strip())


def json_valid(answer: str, expected: str) -> float:
    return float(_parsed(answer) is not _NO_JSON)


def json_fields(answer: str, expected: str) -> float:
    """1 or 0 for what isn't an object, by whether both are the same value."""
    got, should = _parsed(answer), _parsed(expected)
    if not isinstance(should, dict) or not should:
        return float(got is not _NO_JSON and _is_same(got, should))
    alike = sum(1 for name in should if isinstance(got, dict) and name in got and _is_same(got[name], should[name]))
    return alike / len(should)


def _is_same(one: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and true is neither."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


_NO_JSON = object()


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return _NO_JSON


def _rouge(metric: str) -> Score:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing(metric, "rouge-score") from None
    scorer = RougeScorer([metric], use_stemmer=True)
    return lambda answer, expected: float(scorer.score(expected, answer)[metric].fmeasure)


def _of_all_answers(metric: str, base: Sequence[str], tuned: Sequence[str], expected: Sequence[str]) -> Measured:
    """By sacrebleu, whose statistics of each answer are added up for each resample; its bootstrap is of one model."""
    scorer = _corpus_score(metric)
    statistics = [np.array(scorer._extract_corpus_statistics(list(said), [list(expected)])) for said in (base, tuned)]

    def both(rows: Any) -> list[float]:
        return [float(scorer._compute_score_from_stats(of[rows].sum(0).tolist()).score) for of in statistics]

    of_base, of_tuned = both(slice(None))
    generator, n = np.random.default_rng(SEED), len(expected)
    scores = np.array([both(generator.integers(0, n, n)) for _ in range(RESAMPLES)])
    differences = scores[:, 1] - scores[:, 0]
    return Measured(of_base, of_tuned, _middle(scores[:, 0]), _middle(scores[:, 1]), _middle(differences))


def _corpus_score(metric: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing(metric, "sacrebleu") from None
    return getattr(metrics, CORPUS[metric])()


def _users(metric: str) -> Score:
    file, _, name = metric.rpartition(":")
    where = f"metric {metric}"
    spec = importlib.util.spec_from_file_location(Path(file).stem, file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise RecipeError(where, f"{file} is no Python file", "write FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function: Score = getattr(module, name)
    except Exception as error:  # the user's own code may raise anything
        raise RecipeError(where, f"can't be loaded ({error})", "mend the file") from error
    return function


def _missing(metric: str, package: str) -> RecipeError:
    return RecipeError(f"metric {metric}", f"needs {package}", f"pip install {package}")
