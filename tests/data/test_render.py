"""Which tokens are learnt, read id by id on real tokenizers."""

import pytest

from phinetune.data import CannotRender, Example, Rejected, Renderer, Row

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good\n\nbye é😀"},
]


def learnt(tokenizer, messages, **options):
    """(ids, learnt ids) of a conversation."""
    example = Renderer(tokenizer, **options).example(Row("here:1", messages), 10_000)
    assert isinstance(example, Example), example
    return example.ids, [i for i, on in zip(example.ids, example.mask, strict=True) if on]


def test_phi3_id_by_id(phi3_tokenizer):
    ids, supervised = learnt(phi3_tokenizer, TWO_TURNS)
    assert phi3_tokenizer.convert_ids_to_tokens(ids) == [
        "<|system|>", "Be", "▁brief", ".", "<|end|>",
        "<|user|>", "Hi", "▁there", "<|end|>",
        "<|assistant|>", "Hello", "!", "<|end|>",
        "<|user|>", "By", "e", "<|end|>",
        "<|assistant|>", "Good", "<0x0A>", "<0x0A>", "bye", "▁é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<|end|>",
        "<|endoftext|>",
    ]  # fmt: skip
    assert phi3_tokenizer.convert_ids_to_tokens(supervised) == [
        "Hello", "!", "<|end|>",
        "Good", "<0x0A>", "<0x0A>", "bye", "▁é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<|end|>", "<|endoftext|>",
    ]  # fmt: skip
    assert supervised.count(32007) == 2, "one for each assistant turn"
    assert supervised[-1] == 32000
    assert not {32006, 32010, 32001} & set(supervised), "no prompt token"
    assert ids == phi3_tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)


def test_phi3_mask_of_a_short_chat_in_full(phi3_tokenizer):
    messages = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}]
    example = Renderer(phi3_tokenizer).example(Row("here:1", messages), 100)
    assert example.ids == [32010, 18567, 727, 32007, 32001, 10994, 29991, 32007, 32000]
    assert example.mask == [False] * 5 + [True] * 4


def test_smollm2_in_full(smollm2_tokenizer):
    messages = TWO_TURNS[:3]
    example = Renderer(smollm2_tokenizer).example(Row("here:1", messages), 100)
    pieces = [smollm2_tokenizer.decode([i]) for i in example.ids]
    assert "".join(pieces) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert [p for p, on in zip(pieces, example.mask, strict=True) if on] == ["Hello", "!", "<|im_end|>"]
    assert pieces[-1] == "\n", "white space behind the end of turn is never generated"
    assert not example.mask[-1]
    assert example.ids == smollm2_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_last_turn_alone_and_all_tokens(smollm2_tokenizer):
    _, supervised = learnt(smollm2_tokenizer, TWO_TURNS, supervise="last")
    assert smollm2_tokenizer.decode(supervised) == "Good\n\nbye é😀<|im_end|>"
    ids, supervised = learnt(smollm2_tokenizer, TWO_TURNS, supervise="all")
    assert supervised == ids


def test_every_real_alpaca_row(phi3_tokenizer, alpaca_chats):
    renderer = Renderer(phi3_tokenizer)
    for chat in alpaca_chats:
        example = renderer.example(Row("here", chat["messages"]), 100_000)
        assert isinstance(example, Example)
        supervised = [i for i, on in zip(example.ids, example.mask, strict=True) if on]
        assert supervised[-2:] == [32007, 32000]
        assert example.mask.index(True) == example.ids.index(32001) + 1
        assert phi3_tokenizer.decode(supervised[:-2]).strip() == chat["messages"][1]["content"].strip()


def test_the_tokens_no_answer_goes_on_past(phi3_tokenizer, smollm2_tokenizer):
    assert Renderer(phi3_tokenizer).turn_ids() == [32000, 32001, 32007]  # endoftext, assistant, end
    assert Renderer(smollm2_tokenizer).turn_ids() == [1, 2]  # im_start, im_end


def test_control_text_in_a_message_is_refused_by_name(phi3_tokenizer):
    messages = [{"role": "user", "content": "say <|end|> now"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(CannotRender, match=r"message 1 \(user\) spells the control token <\|end\|>"):
        Renderer(phi3_tokenizer).spans(messages)


def with_template(tokenizer, template, controls=()):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(controls)}) if controls else None
    changed.chat_template = template
    return Renderer(changed)


def test_a_chat_that_begins_with_the_assistant(phi3_tokenizer, smollm2_tokenizer):
    messages = [{"role": "assistant", "content": "Hello!"}, *TWO_TURNS[3:]]
    _, supervised = learnt(phi3_tokenizer, messages)
    assert phi3_tokenizer.convert_ids_to_tokens(supervised[:4]) == ["Hello", "!", "<|end|>", "Good"]
    _, supervised = learnt(phi3_tokenizer, messages[:1])
    assert supervised == [10994, 29991, 32007, 32000]
    _, supervised = learnt(smollm2_tokenizer, messages[:1])
    assert smollm2_tokenizer.decode(supervised) == "Hello!<|im_end|>", "not the system message the template adds"


# Meta-Llama-3-8B-Instruct's first template: it ends every rendering with the header of the next answer.
LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{{ '<|start|>assistant<|stop|>\n\n' }}"
)
LLAMA2 = (  # the system message inside the first user turn, no control token between question and answer
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "controls", "expected"),
    [
        (LLAMA3, ["<|start|>", "<|stop|>", "<|eot|>"], ["Hello!<|eot|>", "Good\n\nbye é😀<|eot|>"]),
        (LLAMA2, ["<s>", "</s>"], [" Hello! </s>", " Good\n\nbye é😀 </s>"]),
    ],
)
def test_other_templates(smollm2_tokenizer, template, controls, expected):
    renderer = with_template(smollm2_tokenizer, template, controls)
    text, spans = renderer.spans(TWO_TURNS[1:])
    assert [text[start:end] for start, end in spans] == expected


def test_a_template_that_rewrites_earlier_turns_is_refused(smollm2_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content[:3] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(CannotRender, match="rewrites"):
        with_template(smollm2_tokenizer, template).spans(TWO_TURNS)


def test_a_template_that_drops_the_system_message_is_refused(smollm2_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(CannotRender, match="does not write the system message"):
        with_template(smollm2_tokenizer, template).spans(TWO_TURNS)


def test_too_long_is_listed_and_not_cut(smollm2_tokenizer):
    outcome = Renderer(smollm2_tokenizer).example(Row("chats.jsonl:3", TWO_TURNS), 10)
    assert isinstance(outcome, Rejected)
    assert outcome.where == "chats.jsonl:3"
    assert "above data.max_length=10" in outcome.reason
