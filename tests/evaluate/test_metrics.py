"""Metrics of answers against rouge_score and sacrebleu themselves, by hand, and against a bootstrap in plain Python."""

import json
import math
import random
import statistics

import numpy as np
import pytest
import torch
from conftest import tiny_model

from phinetune.data import Example
from phinetune.errors import RecipeError, RunError
from phinetune.evaluate import RowLosses, bootstrap, evaluate_rows, measure, measure_loss
from phinetune.evaluate.metrics import _score
from phinetune.recipe import ANSWER_METRICS, make_recipe

SAID = [
    "The cats were sitting on mats.\nThey slept.",
    "A large iced mocha, to go.",
    "",
    "Paris is the capital of France.",
    "twelve",
]
TUNED = ["The cat sat on the mat.\nIt slept.", "One large iced mocha to go", "nothing", "Paris", "12"]
EXPECTED = ["The cat sat on the mat.\nIt slept.", "one large iced mocha to go", "nothing at all", "Paris", "12"]


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_rouge_scores_own(metric):
    from rouge_score import rouge_scorer, scoring

    scorer, aggregator = rouge_scorer.RougeScorer([metric], use_stemmer=True), scoring.BootstrapAggregator()
    for answer, should in zip(SAID, EXPECTED, strict=True):
        aggregator.add_scores(scorer.score(should, answer))
    own = statistics.mean(scorer.score(e, s)[metric].fmeasure for s, e in zip(SAID, EXPECTED, strict=True))
    found = measure(metric, SAID, TUNED, EXPECTED)
    assert found.base == pytest.approx(own, abs=1e-12)
    resampled = aggregator.aggregate()[metric]
    assert found.base_interval == pytest.approx((resampled.low.fmeasure, resampled.high.fmeasure), abs=0.08)
    assert found.tuned > found.base


@pytest.mark.parametrize(("metric", "name"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_corpus_metrics_are_sacrebleus_own(metric, name):
    import sacrebleu

    found = measure(metric, SAID, TUNED, EXPECTED)
    for value, said in ((found.base, SAID), (found.tuned, TUNED)):
        assert value == getattr(sacrebleu, name)().corpus_score(said, [EXPECTED]).score
    rng, resampled = random.Random(2), []
    for _ in range(400):
        rows = rng.choices(range(len(SAID)), k=len(SAID))
        texts = [[of[row] for row in rows] for of in (SAID, TUNED, EXPECTED)]
        of_base, of_tuned = (getattr(sacrebleu, name)().corpus_score(said, [texts[2]]).score for said in texts[:2])
        resampled.append((of_base, of_tuned, of_tuned - of_base))
    intervals = [found.base_interval, found.tuned_interval, found.difference_interval]
    for interval, plain in zip(intervals, np.quantile(resampled, [0.025, 0.975], axis=0).T, strict=True):
        assert interval == pytest.approx(tuple(plain), abs=6)  # of 100, from five rows


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "score"),
    [
        ("exact_match", " yes\n", "yes", 1),
        ("exact_match", "Yes", "yes", 0),
        ("json_valid", '{"a": 1}', "", 1),
        ("json_valid", "{'a': 1}", "", 0),
        ("json_valid", "[" * 100_000, "", 0),
        ("json_fields", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 1 / 2),
        ("json_fields", '{"b": 2, "a": 1, "c": 9}', '{"a": 1, "b": 2}', 1),
        ("json_fields", "none", '{"a": 1, "b": 2}', 0),
        ("json_fields", "[1, 2]", '{"a": 1}', 0),
        ("json_fields", "[1, 2]", "[1, 2]", 1),
        ("json_fields", "broken", "broken too", 0),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_fields", '{"a": true, "b": 2.0}', '{"a": 1, "b": 2}', 1 / 2),
        ("json_fields", '{"a": [1, {"b": true}]}', '{"a": [1, {"b": 1}]}', 0),
        ("json_fields", '{"a": [1, {"b": null}]}', '{"a": [1.0, {"b": null}]}', 1),
    ],
)
def test_scores_by_hand(metric, answer, expected, score):
    assert _score(metric)(answer, expected) == score


def test_every_name_of_the_recipe_is_measured():
    for metric in ANSWER_METRICS:
        assert math.isfinite(measure(metric, SAID, TUNED, EXPECTED).tuned)


def test_intervals_are_those_of_a_plain_bootstrap_and_of_the_binomial():
    rng = random.Random(1)
    scores = [float(rng.random() < 0.3) for _ in range(400)]
    low, high = bootstrap(np.array(scores))
    means = sorted(statistics.fmean(rng.choices(scores, k=400)) for _ in range(4000))
    assert (low, high) == pytest.approx((means[100], means[3899]), abs=0.006)
    share = statistics.fmean(scores)
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.006)
    assert bootstrap(np.array(scores)) == (low, high), "of one seed"


def test_the_difference_is_of_the_same_rows():
    """Two models that differ by 0.1 on each row differ by 0.1 on any resample, however unlike the rows are."""
    scores = np.arange(60) % 7 / 7
    low, high = bootstrap((scores + 0.1) - scores)
    assert (low, high) == pytest.approx((0.1, 0.1))


def test_a_function_of_the_users(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(answer, expected):\n    return len(answer) / len(expected)\n")
    found = measure(f"{file}:length", ["ab"], ["abcd"], ["abcd"])
    assert (found.base, found.tuned) == (0.5, 1.0)
    file.write_text("def length(answer, expected):\n    return 1 / 0\n")
    with pytest.raises(RunError, match=r"mine\.py:length: fails on 'ab' \(division by zero\)"):
        measure(f"{file}:length", ["ab"], ["ab"], ["ab"])
    file.write_text("def length(answer, expected):\n    return float('nan')\n")
    with pytest.raises(RunError, match="gives nan"):
        measure(f"{file}:length", ["ab"], ["ab"], ["ab"])
    with pytest.raises(RecipeError, match="can't be loaded"):
        measure(f"{file}:width", ["ab"], ["ab"], ["ab"])
    with pytest.raises(RecipeError, match="is no Python file"):
        measure(f"{tmp_path}/none.py:length", ["ab"], ["ab"], ["ab"])


def test_a_file_without_a_function_is_known_before_anything_is_loaded():
    with pytest.raises(RecipeError, match=r"score\.py.*must be one of .* or FILE\.py:NAME"):
        make_recipe({"model": "smollm2", "data": {"train": "a"}, "evaluation": {"metrics": ["score.py"]}})


def test_a_name_that_is_none():
    with pytest.raises(RecipeError, match=r"must be one of exact_match, .* or FILE\.py:NAME"):
        make_recipe({"model": "x", "data": {"train": "x"}, "evaluation": {"metrics": ["meteor"]}})


def test_a_strangers_recipe_names_no_function(tmp_path):
    """`phinetune evaluate RUN` reads the run's recipe, which may be anybody's."""
    from phinetune.cli.evaluate import evaluation_of

    own = {"metrics": ["bleu", f"{tmp_path}/evil.py:run"], "max_new_tokens": 8, "do_sample": True, "top_p": 0.5}
    recipe, _ = make_recipe({"model": "x", "data": {"train": "x"}, "evaluation": own})
    assert evaluation_of(recipe, [], []).metrics == ["bleu"]
    assert evaluation_of(recipe, ["chrf", "mine.py:f"], []).metrics == ["chrf", "mine.py:f"]
    assert evaluation_of(None, [], []).metrics == ["exact_match"]
    assert evaluation_of(recipe, None, []).metrics == []
    for wrong in (["meteor"], [f"{tmp_path}:run"]):
        with pytest.raises(RecipeError, match="must be one of"):
            evaluation_of(recipe, wrong, [])
    changed = evaluation_of(recipe, [], ["top_p=0.9", "evaluation.temperature=0.5"])
    assert (changed.max_new_tokens, changed.top_p, changed.temperature) == (8, 0.9, 0.5)
    with pytest.raises(RecipeError, match="says nothing about answers"):
        evaluation_of(recipe, [], ["learning_rate=1"])


def test_settings_of_drawn_answers_need_them_to_be_drawn():
    def evaluation(**settings):
        return make_recipe({"model": "x", "data": {"train": "x"}, "evaluation": settings})[0].evaluation

    assert evaluation().sampling == {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    drawn = evaluation(do_sample=True, temperature=0.7, min_p=0.1).sampling
    assert drawn == {**evaluation().sampling, "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 1.0,
                     "min_p": 0.1}  # fmt: skip
    with pytest.raises(RecipeError, match="temperature says how answers are drawn: set do_sample: true"):
        evaluation(temperature=0.7)
    with pytest.raises(RecipeError, match="num_beams=4 is not supported: answers are greedy, or drawn"):
        evaluation(num_beams=4)
    assert evaluation(num_beams=1) == evaluation()
    with pytest.raises(RecipeError, match="did you mean top_p"):
        evaluation(topp=0.5)


def test_the_loss_has_the_interval_of_a_plain_bootstrap_over_rows():
    """Rows of unlike lengths: a resample's loss is that of its tokens, not the mean of its rows'."""
    rng = random.Random(3)
    tokens = [rng.randint(1, 40) for _ in range(150)]
    base = [rng.gauss(2.0, 0.4) * n for n in tokens]
    tuned = [loss - 0.3 * n * rng.random() for loss, n in zip(base, tokens, strict=True)]
    found = measure_loss(RowLosses(base, tokens), RowLosses(tuned, tokens))
    assert found["eval_loss"].base == pytest.approx(sum(base) / sum(tokens))
    assert found["perplexity"].tuned == pytest.approx(math.exp(sum(tuned) / sum(tokens)))
    of_loss, of_perplexity = [], []
    for _ in range(4000):
        rows = rng.choices(range(150), k=150)
        total = sum(tokens[row] for row in rows)
        before, after = (sum(losses[row] for row in rows) / total for losses in (base, tuned))
        of_loss.append((before, after, after - before))
        of_perplexity.append((math.exp(before), math.exp(after), math.exp(after) - math.exp(before)))
    for name, resampled, near in (("eval_loss", of_loss, 0.012), ("perplexity", of_perplexity, 0.1)):
        metric = found[name]
        intervals = [metric.base_interval, metric.tuned_interval, metric.difference_interval]
        for interval, plain in zip(intervals, np.quantile(resampled, [0.025, 0.975], axis=0).T, strict=True):
            assert interval == pytest.approx(tuple(plain), abs=near)
    assert found["eval_loss"].difference_interval[1] < 0


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_each_rows_loss_is_that_of_the_row_alone(family):
    """Laid end to end, with a beginning that some share, or a row at a time; against transformers' own loss."""
    model = tiny_model(family, vocab_size=300) if family != "gpt2" else tiny_gpt2()
    rng = random.Random(5)
    beginning = [rng.randrange(300) for _ in range(24)]
    rows = [
        Example(str(i), ids := beginning[: 24 * (i % 2)] + [rng.randrange(300) for _ in range(3 + 4 * i)],
                [place > 1 and rng.random() < 0.6 for place in range(len(ids) - 1)] + [True])
        for i in range(7)
    ]  # fmt: skip
    found = evaluate_rows(model, rows, 64)
    for row, loss, tokens in zip(rows, found.losses, found.tokens, strict=True):
        ids = torch.tensor([row.ids])
        labels = torch.where(torch.tensor([row.mask]), ids, -100)
        alone = model(ids, labels=labels).loss.item()
        assert loss / tokens == pytest.approx(alone, rel=2e-5)
        assert tokens == sum(row.mask)


def test_rows_are_laid_out_some_at_a_time(monkeypatch):
    model, rng = tiny_model("llama", vocab_size=300), random.Random(5)
    made = [[rng.randrange(300) for _ in range(3 + i)] for i in range(7)]
    rows = [Example(str(i), ids, [True] * len(ids)) for i, ids in enumerate(made)]
    whole = evaluate_rows(model, rows, 64)
    monkeypatch.setattr("phinetune.evaluate.loss.AT_ONCE", 3)
    found = evaluate_rows(model, rows, 64)
    assert found.tokens == whole.tokens
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2)).eval()


def test_a_run_measures_what_is_asked(tmp_path, tiny_llama_folder, chats):
    import phinetune

    result = phinetune.finetune(
        model=str(tiny_llama_folder),
        train=str(chats),
        eval=0.1,
        training_config={"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True, "disable_tqdm": True},
        evaluation={"metrics": ["rouge1", "bleu"], "max_new_tokens": 4},
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tuned"].keys() == {"eval_loss", "perplexity", "rouge1", "bleu"}
    assert summary["confidence_95"].keys() == summary["tuned"].keys()
    assert summary["confidence_95"]["rouge1"].keys() == {"base", "tuned", "difference"}
    low, high = summary["confidence_95"]["rouge1"]["tuned"]
    assert low <= result.summary["tuned"]["rouge1"] <= high
