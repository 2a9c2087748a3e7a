"""For any conversation: what is learnt is what the assistant says."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phinetune.data import Renderer, Row, to_row

# What templates trim is trimmed here too. SmolLM2's vocabulary lacks some control characters, and bytes of
# characters that don't exist yet: `test_characters_that_the_tokenizer_can_not_write`.
TEXT = (
    st.text(
        st.characters(exclude_categories=("Cs", "Cn", "Co", "Cc"), include_characters="\n\t\r"), min_size=1, max_size=60
    )
    .map(str.strip)
    .filter(bool)
)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    return messages


def runs(example):
    """The ids of each run of learnt tokens."""
    found, before = [], False
    for id, on in zip(example.ids.tolist(), example.mask.tolist(), strict=True):
        if on and not before:
            found.append([])
        if on:
            found[-1].append(id)
        before = on
    return found


@settings(max_examples=100, deadline=None)
@given(messages=conversations())
def test_smollm2(smollm2_tokenizer, messages):
    (example,) = Renderer.of(smollm2_tokenizer, max_length=100_000).render(Row("here:1", messages)).examples
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [smollm2_tokenizer.decode(run) for run in runs(example)] == [text + "<|im_end|>" for text in said]
    assert smollm2_tokenizer.decode(example.ids) == Renderer.of(smollm2_tokenizer).renderings(messages)[0].text


@settings(max_examples=100, deadline=None)
@given(messages=conversations())
def test_phi3(phi3_tokenizer, messages):
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    # Sentence pieces write a space as ▁: a message that holds one comes back as a space.
    assume(not any("▁" in m["content"] for m in messages))
    (example,) = Renderer.of(phi3_tokenizer, max_length=100_000).render(Row("here:1", messages)).examples
    learnt = runs(example)
    assert learnt[-1][-2:] == [32007, 32000]
    learnt[-1] = learnt[-1][:-1]
    assert [phi3_tokenizer.decode(run[:-1]).strip() for run in learnt] == [text.strip() for text in said]
    assert all(run[-1] == 32007 for run in learnt)
    assert sum(example.parts) == len(example.ids)


@settings(max_examples=80, deadline=None)
@given(messages=conversations(), limit=st.integers(8, 80), strategy=st.sampled_from(["truncate", "split"]))
def test_what_is_too_long_is_cut_behind_turns(smollm2_tokenizer, messages, limit, strategy):
    from phinetune.data import Finding, Rejected

    renderer = Renderer.of(smollm2_tokenizer, max_length=limit, excess_length_strategy=strategy)
    outcome = renderer.render(Row("here:1", messages))
    if isinstance(outcome, Rejected):
        assert "tokens" in outcome.reason
        return
    said = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    learnt = [smollm2_tokenizer.decode(run) for example in outcome.examples for run in runs(example)]
    assert all(len(example.ids) <= limit for example in outcome.examples)
    if outcome.findings & Finding.WITHOUT_END:
        whole = smollm2_tokenizer.decode(outcome.examples[0].ids)
        assert len(learnt) <= len(said)
        assert not whole.endswith("<|im_end|>\n")
    elif strategy == "split":
        assert learnt == said, "every turn once, in order"
    else:
        assert learnt == said[: len(learnt)], "the first turns, each to its end"


def test_characters_that_the_tokenizer_can_not_write_are_found(smollm2_tokenizer, phi3_tokenizer):
    from phinetune.data import Finding

    def findings(tokenizer, said):
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "Hello."}]
        return Renderer.of(tokenizer).render(Row("here:1", messages)).findings

    assert smollm2_tokenizer("\x06")["input_ids"] == [], "it leaves them out without a word"
    assert findings(smollm2_tokenizer, "a\x06b") == Finding.UNWRITABLE
    assert findings(smollm2_tokenizer, "\U00040000") == Finding.UNWRITABLE
    assert not findings(smollm2_tokenizer, "naïve 漢字 😀\n\t")
    assert not findings(phi3_tokenizer, "a\x06b \U00040000")


@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_a_messages_flag_is_stronger(smollm2_tokenizer, supervise):
    messages = [
        {"role": "user", "content": "One", "train": True},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four", "train": True},
        {"role": "user", "content": "Five"},
        {"role": "assistant", "content": "Six", "train": False},
    ]
    (example,) = Renderer.of(smollm2_tokenizer, supervise=supervise).render(Row("here:1", messages)).examples
    learnt = [smollm2_tokenizer.decode(run) for run in runs(example)]
    expected = {
        "assistant": ["One<|im_end|>", "Two<|im_end|>", "Four<|im_end|>"],
        "last": ["One<|im_end|>", "Four<|im_end|>"],
        "all": smollm2_tokenizer.decode(example.ids).split("Six"),
    }
    assert learnt == expected[supervise]


PROMPT = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
COMPLETION = [
    {"role": "user", "content": "Three"},
    {"role": "assistant", "content": "Four"},
    {"role": "user", "content": "Five"},
    {"role": "assistant", "content": "Six"},
]


@pytest.mark.parametrize(
    ("supervise", "of_completion", "of_chat"),
    [
        ("assistant", ["Four", "Six"], ["Two", "Four", "Six"]),
        ("completion", ["Four", "Six"], ["all"]),
        ("last", ["Six"], ["Six"]),
        ("all", ["all"], ["all"]),
    ],
)
def test_what_is_learnt_of_a_prompt_and_its_completion(smollm2_tokenizer, supervise, of_completion, of_chat):
    renderer = Renderer.of(smollm2_tokenizer, supervise=supervise)
    for record, expected in (
        ({"prompt": PROMPT, "completion": COMPLETION}, of_completion),
        ({"messages": PROMPT + COMPLETION}, of_chat),
    ):
        (example,) = renderer.render(to_row(record, "here:1")).examples
        whole = smollm2_tokenizer.decode(example.ids)
        learnt = [smollm2_tokenizer.decode(run) for run in runs(example)]
        assert learnt == ([whole] if expected == ["all"] else [f"{words}<|im_end|>" for words in expected])


def test_a_flag_in_a_completion_is_stronger(smollm2_tokenizer):
    completion = [{"role": "assistant", "content": "Four", "train": False}, {"role": "user", "content": "Five"}]
    record = {"prompt": PROMPT + COMPLETION[:1], "completion": [*completion, COMPLETION[3]]}
    for supervise, left_out in (("all", "Four"), ("completion", "Four"), ("assistant", "Four")):
        (example,) = Renderer.of(smollm2_tokenizer, supervise=supervise).render(to_row(record, "here:1")).examples
        learnt = "".join(smollm2_tokenizer.decode(run) for run in runs(example))
        assert left_out not in learnt
        assert "Six" in learnt
        assert ("Two" in learnt) == (supervise == "all")


@pytest.mark.parametrize("words", ["a", "assistant", "im", "user"])
def test_an_unlearnt_answer_is_not_looked_for_in_its_header(smollm2_tokenizer, words):
    messages = [{"role": "user", "content": "One"}, {"role": "assistant", "content": words, "train": False}]
    messages += COMPLETION[:2]
    (example,) = Renderer.of(smollm2_tokenizer, supervise="all").render(Row("here:1", messages)).examples
    whole = smollm2_tokenizer.decode(example.ids)
    learnt = "".join(smollm2_tokenizer.decode(run) for run in runs(example))
    assert learnt == whole.replace(f"<|im_start|>assistant\n{words}<|im_end|>", "<|im_start|>assistant\n<|im_end|>")
