"""Ids and the tokens of characters, against the tokenizers themselves."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.data import Renderer
from phinetune.data.encode import Encoder

PIECES = [
    *("a", "b ", " c", "  ", "\n", "\t", "\r\n", " \n ", ".", ",", "'s", "'", "1", " 23", "4567", "é", "e\u0301"),
    *("漢字", "ひ", "한", "😀", "\u200d", "\u00a0", "\u3000", "\u200b", "\x1c", "\x85", "\x0b"),
    *("<", "|", ">", "</", "word", " Word"),
]


@pytest.fixture(params=["smollm2", "phi3"])
def tokenizer(request, smollm2_tokenizer):
    return smollm2_tokenizer if request.param == "smollm2" else request.getfixturevalue("phi3_tokenizer")


def test_words_are_remembered_for_both(tokenizer):
    assert Encoder.of(tokenizer).remembers_words


def same(tokenizer, texts):
    encoder = Encoder.of(tokenizer)
    for text, got in zip(texts, encoder.encode_batch(texts), strict=True):
        true = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert list(got.ids) == true["input_ids"], text
        begins = [begin for begin, _ in true["offset_mapping"]]
        for char in range(0, len(text) + 1, 1 + len(text) // 40):
            assert got.token_at(char) == sum(begin < char for begin in begins), (text, char)


def test_drawn_texts(tokenizer):
    rng = random.Random(0)
    pieces = PIECES + list(Encoder.of(tokenizer).added)[:8]
    same(tokenizer, ["".join(rng.choices(pieces, k=rng.randint(0, 25))) for _ in range(3000)])


def test_real_text(tokenizer, alpaca_chats):
    templated = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in alpaca_chats]
    same(tokenizer, templated[:400])


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(), max_size=5))
def test_any_text(smollm2_tokenizer, texts):
    same(smollm2_tokenizer, texts)


def test_tokenizers_that_words_do_not_suit_go_directly(smollm2_tokenizer):
    """A vocabulary with a token across a space: its ids are the tokenizer's own all the same."""
    import json

    tree = json.loads(smollm2_tokenizer.backend_tokenizer.to_str())
    tree["model"]["vocab"]["eĠt"] = len(tree["model"]["vocab"])
    tree["model"]["merges"].append(["e", "Ġt"])
    tree["pre_tokenizer"]["use_regex"] = False
    encoder = Encoder(json.dumps(tree))
    assert not encoder.remembers_words
    text = "e t"
    assert encoder.encode(text).ids == encoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert tree["model"]["vocab"]["eĠt"] in encoder.encode(text).ids


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_no_added_token_comes_from_a_message(tokenizer, role):
    """Every one, whole and in halves on both sides of a turn, in training and in prompts; the text stays as it is."""
    renderer = Renderer.of(tokenizer, max_length=10_000)
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    words = ["Be kind.", "Hi", "Hello."]
    place = ["system", "user", "assistant"].index(role)

    def chat(texts):
        return [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), texts, strict=True)]

    def controls(ids):
        return [id for id in ids if id in added.values()]

    plain = renderer.renderings(chat(words))[0]
    template_alone = controls(tokenizer(plain.text, add_special_tokens=False)["input_ids"])
    prompt_alone = controls(renderer.prompt_ids(chat(words)[:2]))
    for token in added:
        whole = [*words]
        whole[place] = f"say {token} and{token}on, {token}"
        split = [*words]
        split[place] += token[: len(token) // 2]
        split[(place + 1) % 3] = token[len(token) // 2 :] + split[(place + 1) % 3]
        for texts in (whole, split):
            from phinetune.data import Row

            (example,) = renderer.render(Row("here:1", chat(texts))).examples
            assert controls(example.ids.tolist()) == template_alone, (token, texts)
            text = tokenizer.decode(example.ids)
            assert all(said in text for said in texts), (token, text)
            if place < 2:
                assert controls(renderer.prompt_ids(chat(texts)[:2])) == prompt_alone


def test_ordinary_text_around_a_spelled_token_keeps_its_ids(smollm2_tokenizer):
    from phinetune.data import Row

    renderer = Renderer.of(smollm2_tokenizer)
    said = "The quick brown fox, it's naïve: 漢字 <|im_end|> jumps over 13 dogs."
    (example,) = renderer.render(
        Row("here:1", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}])
    ).examples
    learnt = example.ids[example.mask].tolist()
    before, after = said.split("<|im_end|>")
    for part in (before.rstrip(), after):
        ids = smollm2_tokenizer(part, add_special_tokens=False)["input_ids"]
        assert any(learnt[i : i + len(ids)] == ids for i in range(len(learnt))), part
    assert learnt.count(2) == 1
    assert learnt[-1] == 2
