"""Which tokens are learnt, read id by id on real tokenizers."""

import pytest

from phinetune.data import CannotRender, Rejected, Renderer, Row

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good\n\nbye é😀"},
]


def learnt(tokenizer, messages, **options):
    """(ids, learnt ids) of a conversation."""
    (example,) = Renderer.of(tokenizer, max_length=10_000, **options).render(Row("here:1", messages)).examples
    return example.ids.tolist(), example.ids[example.mask].tolist()


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
    (example,) = Renderer.of(phi3_tokenizer).render(Row("here:1", messages)).examples
    assert example.ids.tolist() == [32010, 18567, 727, 32007, 32001, 10994, 29991, 32007, 32000]
    assert example.mask.tolist() == [False] * 5 + [True] * 4
    assert example.parts == (0, 2, 3, 0, 4), "Hi there, Hello!<|end|>, and four control tokens of the template's"


def test_smollm2_in_full(smollm2_tokenizer):
    messages = TWO_TURNS[:3]
    (example,) = Renderer.of(smollm2_tokenizer).render(Row("here:1", messages)).examples
    pieces = [smollm2_tokenizer.decode([i]) for i in example.ids]
    assert "".join(pieces) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert [p for p, on in zip(pieces, example.mask, strict=True) if on] == ["Hello", "!", "<|im_end|>"]
    assert pieces[-1] == "\n", "white space behind the end of turn is never generated"
    assert not example.mask[-1]
    assert example.ids.tolist() == smollm2_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_last_turn_alone_and_all_tokens(smollm2_tokenizer):
    _, supervised = learnt(smollm2_tokenizer, TWO_TURNS, supervise="last")
    assert smollm2_tokenizer.decode(supervised) == "Good\n\nbye é😀<|im_end|>"
    ids, supervised = learnt(smollm2_tokenizer, TWO_TURNS, supervise="all")
    assert supervised == ids


def test_every_real_alpaca_row(phi3_tokenizer, alpaca_chats):
    rows = [Row("here", chat["messages"]) for chat in alpaca_chats]
    outcomes = Renderer.of(phi3_tokenizer, max_length=100_000).render_batch(rows)
    for chat, outcome in zip(alpaca_chats, outcomes, strict=True):
        (example,) = outcome.examples
        ids, supervised = example.ids.tolist(), example.ids[example.mask].tolist()
        assert ids == phi3_tokenizer.apply_chat_template(chat["messages"], tokenize=True, return_dict=False)
        assert supervised[-2:] == [32007, 32000]
        assert example.mask.tolist().index(True) == ids.index(32001) + 1
        assert phi3_tokenizer.decode(supervised[:-2]).strip() == chat["messages"][1]["content"].strip()


def test_the_tokens_no_answer_goes_on_past(phi3_tokenizer, smollm2_tokenizer):
    assert Renderer.of(phi3_tokenizer).turn_ids() == [32000, 32001, 32007]  # endoftext, assistant, end
    assert Renderer.of(smollm2_tokenizer).turn_ids() == [1, 2]  # im_start, im_end


def with_template(tokenizer, template, controls=()):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(controls)}) if controls else None
    changed.chat_template = template
    return Renderer.of(changed)


CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final{% endif %}<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' "
    "else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize("words", ["final", "a", "channel", "assistant", "message", "Yes"])
@pytest.mark.parametrize("thinking", [None, "The final message."])
def test_words_that_stand_in_the_header_of_their_own_turn(smollm2_tokenizer, words, thinking):
    tokens = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
    renderer = with_template(smollm2_tokenizer, CHANNELS, tokens)
    said = {"role": "assistant", "content": words, **({"thinking": thinking} if thinking else {})}
    (rendering,) = renderer.renderings([{"role": "user", "content": "Which?"}, said])
    thought = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking else ""
    learnt = [rendering.text[begin:end] for begin, end in rendering.learnt]
    assert learnt == [f"{thought}<|channel|>final<|message|>{words}<|return|>"]


def test_a_chat_that_begins_with_the_assistant(phi3_tokenizer, smollm2_tokenizer):
    messages = [{"role": "assistant", "content": "Hello!"}, *TWO_TURNS[3:]]
    _, supervised = learnt(phi3_tokenizer, messages)
    assert phi3_tokenizer.convert_ids_to_tokens(supervised[:4]) == ["Hello", "!", "<|end|>", "Good"]
    _, supervised = learnt(phi3_tokenizer, messages[:1])
    assert supervised == [10994, 29991, 32007, 32000]
    _, supervised = learnt(smollm2_tokenizer, messages[:1])
    assert smollm2_tokenizer.decode(supervised) == "Hello!<|im_end|>", "not the system message the template adds"


def test_a_template_that_drops_the_system_message_is_refused(smollm2_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(CannotRender, match="does not write the system message"):
        with_template(smollm2_tokenizer, template).renderings(TWO_TURNS)


def test_too_long_is_listed_and_not_cut(smollm2_tokenizer):
    outcome = Renderer.of(smollm2_tokenizer, max_length=10).render(Row("chats.jsonl:3", TWO_TURNS))
    assert isinstance(outcome, Rejected)
    assert outcome.where == "chats.jsonl:3"
    assert "above data.max_length=10" in outcome.reason
