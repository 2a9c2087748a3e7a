"""Batched answers against transformers' own generation of each prompt alone."""

import pytest
import torch

from phinetune import lora
from phinetune.data import Renderer
from phinetune.generate import answers, stream
from phinetune.model import load_model, stop_ids
from phinetune.recipe import ModelKwargs


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
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batched_answers_are_those_of_each_prompt_alone(smollm2, smollm2_tokenizer, system, batch_size):
    alone = []
    for conversation in conversations(system):
        ids = smollm2_tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = smollm2.generate(**ids, max_new_tokens=16, do_sample=False, use_cache=True)
        alone.append(smollm2_tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers(smollm2, smollm2_tokenizer, prompts(smollm2_tokenizer, system), 16, batch_size) == alone
    assert any(len(text.split()) > 3 for text in alone)


def test_the_head_reads_rows_that_lie_together(smollm2, smollm2_tokenizer, monkeypatch):
    """Of a slice of a batch torch multiplies row by row, with a copy of the head's weight for each."""
    head, read = smollm2.get_output_embeddings(), []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: (read.append(x), forward(x))[1])
    answers(smollm2, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief."), 3)
    assert head._forward_pre_hooks == {}, "nothing is left on the model"
    assert max(len(x) for x in read) == len(QUESTIONS)
    assert all(x.is_contiguous() for x in read)


def test_prompts_for_which_memory_is_refused_are_answered_in_halves(smollm2, smollm2_tokenizer, monkeypatch, caplog):
    from phinetune import generate

    asked = prompts(smollm2_tokenizer, "Be brief.")
    whole, real, sizes = answers(smollm2, smollm2_tokenizer, asked, 4), generate._greedy, []

    def greedy(model, prompts, *given):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise MemoryError("refused")
        return real(model, prompts, *given)

    monkeypatch.setattr(generate, "_greedy", greedy)
    assert answers(smollm2, smollm2_tokenizer, asked, 4) == whole
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert "going on with 2" in caplog.text

    def never(*given):
        raise MemoryError("refused")

    monkeypatch.setattr(generate, "_greedy", never)
    with pytest.raises(MemoryError):
        answers(smollm2, smollm2_tokenizer, asked[:1], 4)


def test_streaming_gives_the_same_answer_in_pieces(smollm2, smollm2_tokenizer):
    (whole,) = answers(smollm2, smollm2_tokenizer, prompts(smollm2_tokenizer, "Be brief.")[:1], 30)
    pieces = []
    assert stream(smollm2, smollm2_tokenizer, conversations("Be brief.")[0], 30, write=pieces.append) == whole
    assert len(pieces) > 2
    assert "Paris" in whole


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
