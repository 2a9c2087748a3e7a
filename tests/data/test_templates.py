"""Public chat templates x conversations: what is learnt, written out by hand in templates.py."""

import copy
import functools

import pytest
from templates import CONVERSATIONS, EXPECTED, TEMPLATES, Refused, control_text
from transformers import AddedToken

from phinetune.data import CannotRender, Rejected, Renderer, Row

NAMES = [*CONVERSATIONS, "control_text"]
BY_NAME = {template.name: template for template in TEMPLATES}


@functools.cache
def tokenizer_of(name, base):
    """A real tokenizer with a template and its control tokens."""
    template = BY_NAME[name]
    tokenizer = copy.deepcopy(base)
    for tokens, special in ((template.special, True), (template.added, False)):
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    tokenizer.chat_template = template.jinja
    tokenizer.bos_token, tokenizer.eos_token = template.bos or None, template.eos or None
    return tokenizer


@functools.cache
def renderer_of(name, base):
    return Renderer.of(tokenizer_of(name, base), max_length=10_000)


def conversation_of(template, conversation):
    return control_text(BY_NAME[template]) if conversation == "control_text" else CONVERSATIONS[conversation]


def test_there_are_enough_of_them():
    assert len(TEMPLATES) >= 14
    assert {(t.name, name) for t in TEMPLATES for name in NAMES} == set(EXPECTED)


@pytest.mark.parametrize("conversation", NAMES)
@pytest.mark.parametrize("template", BY_NAME)
def test_what_is_learnt(template, conversation, smollm2_tokenizer):
    tokenizer = tokenizer_of(template, smollm2_tokenizer)
    renderer = renderer_of(template, smollm2_tokenizer)
    said = conversation_of(template, conversation)
    row = Row("here:1", said.messages, said.tools)
    expected = EXPECTED[template, conversation]
    if isinstance(expected, Refused):
        with pytest.raises(CannotRender) as error:
            renderer.renderings(said.messages, said.tools)
        outcome = renderer.render(row)
        assert isinstance(outcome, Rejected)
        assert outcome.reason == error.value.reason
        assert "chat template" in outcome.reason
        assert expected.reason in outcome.reason
        return

    renderings = renderer.renderings(said.messages, said.tools)
    assert [[r.text[begin:end] for begin, end in r.learnt] for r in renderings] == expected
    outcome = renderer.render(row)
    assert len(outcome.examples) == len(expected)
    for example, rendering, spans in zip(outcome.examples, renderings, expected, strict=True):
        ids = example.ids.tolist()
        assert tokenizer.decode(ids) == rendering.text
        offsets = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if conversation != "control_text":  # a token is learnt if it begins inside what is learnt
            begins = [any(a <= begin < b for a, b in rendering.learnt) for begin, _ in offsets]
            assert example.mask.tolist() == begins
        learnt = tokenizer.decode(example.ids[example.mask])
        if (template, conversation) == ("mistral-7b-v0.1", "reasoning"):
            # "[/INST]<think>": no control token stands between, and this tokenizer has a token for "]<"
            assert learnt == "".join(span.removeprefix("<") for span in spans)
        else:
            assert learnt == "".join(spans)
        assert sum(example.parts) == len(ids)
        if conversation == "control_text":
            continue
        whole = rendering.messages
        assert ids == tokenizer.apply_chat_template(whole, said.tools, tokenize=True, return_dict=False)


@pytest.mark.parametrize("template", BY_NAME)
def test_control_text_stays_text(template, smollm2_tokenizer):
    """The template's own control tokens are all there are, and the text is the same byte for byte."""
    if isinstance(EXPECTED[template, "control_text"], Refused):
        return
    tokenizer = tokenizer_of(template, smollm2_tokenizer)
    renderer = renderer_of(template, smollm2_tokenizer)
    said = control_text(BY_NAME[template])
    harmless = [{**m, "content": m["content"].replace(BY_NAME[template].end, "WORD")} for m in said.messages]
    controls = set(tokenizer.added_tokens_decoder)
    (example,) = renderer.render(Row("here:1", said.messages)).examples
    (plain,) = renderer.render(Row("here:1", harmless)).examples
    assert [i for i in example.ids.tolist() if i in controls] == [i for i in plain.ids.tolist() if i in controls]
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(said.messages, tokenize=False)
    prompt = renderer.prompt_ids(said.messages[:1])
    plain_prompt = renderer.prompt_ids(harmless[:1])
    assert [i for i in prompt if i in controls] == [i for i in plain_prompt if i in controls]
