"""Batched answers against transformers' own generation of each prompt alone."""

import pytest
import torch
from conftest import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from phinetune import lora
from phinetune.data import Renderer
from phinetune.errors import RunError
from phinetune.generate import _Pieces, answers, stream
from phinetune.model import load_model, stop_ids
from phinetune.recipe import ModelKwargs, make_recipe


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", ModelKwargs(dtype="float32"))


QUESTIONS = ["What is the capital of France?", "Say hello.", "Name three colours of the rainbow, please.", "2+2?"]


def conversations(system):
    return [[{"role": "system", "content": system}, {"role": "user", "content": question}] for question in QUESTIONS]


def prompts(tokenizer, system):
    return [Renderer.of(tokenizer).prompt_ids(conversation) for conversation in conversations(system)]


@pytest.mark.parametrize(
    "system", ["Be brief.", "You are a careful assistant that answers in one short sentence only."]
)
def test_batched_answers_are_those_of_each_prompt_alone(smollm2, smollm2_tokenizer, system):
    alone = []
    for conversation in conversations(system):
        ids = smollm2_tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = smollm2.generate(**ids, max_new_tokens=16, do_sample=False, use_cache=True)
        alone.append(smollm2_tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    for batch_size in (1, 3, 4):
        assert answers(smollm2, smollm2_tokenizer, prompts(smollm2_tokenizer, system), 16, batch_size) == alone
    assert any(len(text.split()) > 3 for text in alone)


def test_the_head_reads_rows_that_lie_together(smollm2, smollm2_tokenizer, monkeypatch):
    """Of a slice of a batch torch multiplies row by row, with a copy of the head's weight for each."""
    head, read = smollm2.get_output_embeddings(), []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: (read.append(x), forward(x))[1])
    answers(smollm2, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief."), 3)
    assert head.forward(torch.ones(1, 1, head.in_features)).shape[-1] == head.out_features
    assert read.pop().shape[0] == 1, "what was there before is there again"
    assert max(len(x) for x in read) == len(QUESTIONS)
    assert all(x.is_contiguous() for x in read)


def test_prompts_for_which_memory_is_refused_are_answered_in_halves(smollm2, smollm2_tokenizer, monkeypatch, caplog):
    from phinetune import generate

    asked = prompts(smollm2_tokenizer, "Be brief.")
    whole, real, sizes = answers(smollm2, smollm2_tokenizer, asked, 4), generate._generate, []

    def generated(model, prompts, *given):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise MemoryError("refused")
        return real(model, prompts, *given)

    monkeypatch.setattr(generate, "_generate", generated)
    assert answers(smollm2, smollm2_tokenizer, asked, 4) == whole
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert "going on with 2" in caplog.text

    def never(*given):
        raise MemoryError("refused")

    monkeypatch.setattr(generate, "_generate", never)
    with pytest.raises(MemoryError):
        answers(smollm2, smollm2_tokenizer, asked[:1], 4)


def test_streaming_gives_the_same_answer_in_pieces(smollm2, smollm2_tokenizer, monkeypatch):
    (whole,) = answers(smollm2, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief.")[:1], 30)
    pieces = []
    assert stream(smollm2, smollm2_tokenizer, conversations("Be brief.")[0], 30, write=pieces.append) == whole
    assert len(pieces) > 2
    assert "Paris" in whole
    monkeypatch.setattr(smollm2.generation_config, "repetition_penalty", 1.9)
    assert stream(smollm2, smollm2_tokenizer, conversations("Be brief.")[0], 30) == whole, "greedy is greedy"


def test_generation_stops_at_the_end_of_a_turn(phi3_tokenizer, smollm2, smollm2_tokenizer):
    assert stop_ids(smollm2, smollm2_tokenizer) == [1, 2]

    class Phi3:
        class generation_config:
            eos_token_id = 32000

    assert stop_ids(Phi3, phi3_tokenizer) == [32000, 32001, 32007]
    assert Renderer.of(phi3_tokenizer).prompt([{"role": "user", "content": "a"}]).endswith("<|assistant|>\n")


def test_folded_weights_answer_as_the_adapter_does(smollm2_tokenizer):
    model = load_model("smollm2", ModelKwargs(dtype="float32"))
    lora.adapt(model, "all-linear", r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.03)
    plain = answers(model, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief."), 12)
    with lora.fused(model):
        folded = answers(model, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief."), 12)
    with lora.disabled(model):
        base = answers(model, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief."), 12)
    assert folded == plain
    assert base != plain


SAMPLING = make_recipe(
    {
        "model": "x",
        "data": {"train": "x"},
        "evaluation": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2},
    }
)[0].evaluation.sampling


def test_drawn_answers_are_transformers_own_and_of_their_seed(smollm2, smollm2_tokenizer):
    (prompt, *_) = asked = prompts(smollm2_tokenizer, "Be brief.")
    ids = torch.tensor([prompt])
    torch.manual_seed(7)
    out = smollm2.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=[2],
                           pad_token_id=2, use_cache=True, **SAMPLING)  # fmt: skip
    alone = smollm2_tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    state = torch.get_rng_state()
    assert answers(smollm2, smollm2_tokenizer, [prompt], 12, sampling=SAMPLING, seed=7) == [alone]
    drawn = [answers(smollm2, smollm2_tokenizer, asked, 12, 2, sampling=SAMPLING, seed=seed) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state), "the run's own generator is left as it was"


def test_padding_is_nothing_that_was_said(smollm2, smollm2_tokenizer, monkeypatch):
    """What may not be repeated is looked for in all of a prompt. Padding is a token that ends answers: did it count,
    they would go on."""
    (full_stop,) = smollm2_tokenizer.encode(".", add_special_tokens=False)
    monkeypatch.setattr("phinetune.generate.stop_ids", lambda model, tokenizer: [full_stop, 2])
    settings = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 1}
    asked = prompts(smollm2_tokenizer, "Be brief")
    assert len({len(prompt) for prompt in asked}) > 1
    alone = [answers(smollm2, smollm2_tokenizer, [prompt], 24, sampling=settings)[0] for prompt in asked]
    assert answers(smollm2, smollm2_tokenizer, asked, 24, sampling=settings) == alone
    assert alone != answers(smollm2, smollm2_tokenizer, asked, 24)


def test_streamed_lines_keep_their_spaces(phi3_tokenizer):
    """Phi-3's decoder leaves out the first space of a text, and of no line behind it."""
    said = "def f():\n    return 1\n\n- a\n  - b 😀"
    ids, pieces = phi3_tokenizer.encode(said, add_special_tokens=False), []
    streamer = _Pieces(phi3_tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in [*ids, 32007]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == streamer.text == said
    assert len(pieces) > 10


def test_beyond_what_a_model_was_made_for(smollm2_tokenizer, caplog):
    model = tiny_model("llama", max_position_embeddings=64)
    prompt = list(range(100, 160))
    answers(model, smollm2_tokenizer, [prompt[:40]], 16)
    assert not caplog.records
    answers(model, smollm2_tokenizer, [prompt + prompt], 4)
    assert "was made for 64 positions, and a prompt has 120 tokens: it answers badly" in caplog.text
    learnt = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2, vocab_size=49_152)).eval()
    learnt.generation_config.eos_token_id = None
    (one,) = smollm2_tokenizer.encode(" one", add_special_tokens=False)
    with torch.no_grad():  # whatever it reads, it says that word
        learnt.transformer.ln_f.weight.zero_()
        learnt.transformer.ln_f.bias.fill_(1)
        learnt.lm_head.weight.zero_()[one] = 1
    caplog.clear()
    said = answers(learnt, smollm2_tokenizer, [prompt, prompt[:10], prompt[:20]], 16)
    assert said == [" one" * 4, " one" * 16, " one" * 16], "the long one doesn't shorten the others' answers"
    assert "a prompt has 60 tokens: its answer ends after 4" in caplog.text
    with pytest.raises(RunError, match="was made for 64 positions, and a prompt has 120 tokens; give shorter ones"):
        answers(learnt, smollm2_tokenizer, [prompt + prompt], 4)
