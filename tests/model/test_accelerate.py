"""An accelerated model against the same model as transformers and PEFT run it."""

import copy
import functools
import json
import pickle
import subprocess
import sys
import types
import warnings

import peft
import pytest
import torch
from conftest import relative_error, tiny_config, tiny_model
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaForQuestionAnswering, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import phinetune
from phinetune.layers import attention, fast
from phinetune.model.accelerate import FlatBackbone, line_of

FAMILIES = ["llama", "mistral", "phi3", "qwen2"]
LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 20,
    },
    "max_position_embeddings": 80,
    "original_max_position_embeddings": 20,
}


def plain_model(family, with_peft=True, **changes):
    """transformers' model in training, with an adapter whose B isn't zero."""
    model = tiny_model(family, "sdpa", **{"vocab_size": 500, **changes})
    if with_peft:
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT looks for the base model's files
            model = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def both(family, with_peft=True, **changes):
    """(plain, accelerated) with the same weights."""
    plain = plain_model(family, with_peft, **changes)
    return plain, phinetune.accelerate(copy.deepcopy(plain))


def batch(kind, lengths=(13, 30, 7, 21)):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 500, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    if kind == "no mask":
        ids = torch.randint(3, 500, (3, 17), generator=generator)
        return {"input_ids": ids, "labels": ids.masked_fill(ids < 100, -100)}
    if kind in ("packed", "flash's bounds"):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.cat(rows)[None]
        found = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions < 3, -100)}
        if kind == "flash's bounds":
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            found |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": width, "max_length_k": width}
        return found
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if kind == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    labels = ids.masked_fill(mask.roll(1, 1) * mask == 0, -100)  # padding predicts nothing
    labels[:, :3] = -100
    for i, row in enumerate(rows):  # nothing predicts a first token, which left padding would
        labels[i, width - len(row) if kind == "left" else 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def backbone_of(model):
    (found,) = [module for module in model.modules() if isinstance(module, FlatBackbone)]
    return found


@pytest.fixture
def lines(monkeypatch):
    """How many lines fast layers got."""
    seen = []
    flat = fast.FastLayer._flat

    def counted(self, x_TD, *args):
        seen.append(len(x_TD))
        return flat(self, x_TD, *args)

    monkeypatch.setattr(fast.FastLayer, "_flat", counted)
    return seen


@pytest.mark.parametrize("kind", ["right", "left", "no mask", "packed", "flash's bounds"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_adapter_gradients_are_pefts(family, kind, lines):
    plain, ours = both(family)
    inputs = batch(kind)
    reference, output = plain(**inputs, use_cache=False).loss, ours(**inputs)
    loss = output.loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert output.logits is None, "the loss alone"
    reference.backward()
    loss.backward()
    expected = gradients(plain)
    assert len(expected) == len(gradients(ours)) > 0
    for name, gradient in gradients(ours).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum().item()
    assert lines == [tokens] * 2, "each layer saw the real tokens in one line"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_gives_the_same_logits_and_loss(family, lines):
    plain, ours = both(family, with_peft=False)
    inputs = batch("right")
    assert ours(**inputs).loss.item() == pytest.approx(plain(**inputs).loss.item(), rel=1e-5)
    plain.eval(), ours.eval()
    reference, output = plain(**inputs, use_cache=False), ours(**inputs, use_cache=False)
    assert len(lines) == 4
    assert output.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(output.logits[real], reference.logits[real], rtol=1e-4, atol=1e-4)
    assert not output.logits[~real].any()
    items = torch.tensor(1000)
    with torch.no_grad():
        expected = plain(**inputs, num_items_in_batch=items).loss
        assert ours(**inputs, num_items_in_batch=items, skip_logits=True).loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_gives_the_same_ids(family):
    plain, ours = both(family)
    plain.eval(), ours.eval()
    inputs = {name: value for name, value in batch("left").items() if name != "labels"}
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    assert torch.equal(ours.generate(**inputs, **settings), plain.generate(**inputs, **settings))
    assert ours(**inputs).past_key_values is not None, "in evaluation the config's cache is as it was"


def test_the_same_object_its_names_and_its_files(tmp_path):
    plain = plain_model("llama")
    expected = copy.deepcopy(plain)
    before = {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()}
    model = phinetune.accelerate(plain)
    assert model is plain and phinetune.accelerate(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    for folder, each in (("plain", expected), ("ours", model)):
        each.save_pretrained(tmp_path / folder)
        each.get_base_model().save_pretrained(tmp_path / folder / "base")
    for file in sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.json")):
        found, wanted = (json.loads((tmp_path / name / file).read_text()) for name in ("ours", "plain"))
        for each in (found, wanted):
            each["target_modules"] = sorted(each.get("target_modules", []))  # PEFT writes a set
        assert found == wanted
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    again = tmp_path / "whole.pt"
    torch.save(model, again)
    inputs = batch("right")
    for other in (copy.deepcopy(model), torch.load(again, weights_only=False)):
        assert isinstance(backbone_of(other), FlatBackbone)
        assert other(**inputs).loss.item() == model(**inputs).loss.item()


def test_recorded_hidden_states_and_what_has_no_line_are_transformers_own(lines):
    plain, ours = both("llama")
    inputs = batch("right")
    reference = plain(**inputs, output_hidden_states=True, use_cache=False)
    output = ours(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == len(reference.hidden_states) == 3
    for state, expected in zip(output.hidden_states, reference.hidden_states, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    others = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    assert ours(inputs_embeds=embeds, **others).loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    assert not lines
    loss, logits = ours(**inputs, skip_logits=False, return_dict=False)[:2]
    assert loss.item() == pytest.approx(reference.loss.item(), rel=1e-5) and logits.shape[-1] == 500
    assert lines
    (loss,) = ours(**inputs, return_dict=False)
    assert loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    lines.clear()
    holes = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holes["attention_mask"][:, 2] = 0
    assert ours(**holes).loss.item() == pytest.approx(plain(**holes).loss.item(), rel=1e-5)
    assert not lines
    own = ours.get_base_model()
    own.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
    assert ours(**inputs).loss.item() == 7


def test_supervised_padding_is_computed_as_transformers_does(lines):
    plain, ours = both("llama")
    inputs = batch("right")
    inputs["labels"] = inputs["input_ids"]  # padding too, as a careless collator has it
    reference = plain(**inputs, use_cache=False).loss.item()
    assert ours(**inputs).loss.item() == pytest.approx(reference, rel=1e-5)
    ours.eval()
    assert ours(**inputs, use_cache=False).loss.item() == pytest.approx(reference, rel=1e-5)
    assert not lines


@pytest.mark.parametrize("lengths, in_line", [((5, 10), True), ((10, 25), True), ((10, 18), False), ((22, 40), True)])
def test_longrope_takes_the_factors_that_the_padded_batch_takes(lengths, in_line, lines):
    """Padded to a multiple of 12, rows of 10 and 18 tokens are 24 columns, beyond the boundary at 20."""
    plain, ours = both("phi3", **LONG_ROPE)
    inputs = batch("right", lengths)
    more = -inputs["input_ids"].shape[1] % 12
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    inputs = {name: torch.nn.functional.pad(inputs[name], (0, more), value=value) for name, value in values.items()}
    reference, loss = plain(**inputs, use_cache=False).loss, ours(**inputs).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert bool(lines) == in_line


@pytest.mark.parametrize("family", ["mistral", "phi3"])
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_a_sliding_window_is_kept(family, kind, lines):
    plain, ours = both(family, sliding_window=6)
    inputs = batch(kind)
    assert ours(**inputs).loss.item() == pytest.approx(plain(**inputs, use_cache=False).loss.item(), rel=1e-5)
    assert lines


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, lines):
    plain, ours = both("llama")
    inputs = batch("right")
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**inputs).loss.backward()
    assert len(lines) == 4, "two layers, twice"
    expected = gradients(plain)
    for name, gradient in gradients(ours).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_under_autocast(weights, lines):
    plain, ours = both("llama")
    exact = plain(**batch("right"), use_cache=False).loss.item()
    for model in (plain, ours):
        base = model.get_base_model().to(weights)
        for name, parameter in base.named_parameters():
            if "lora_" in name:  # as PEFT keeps them
                parameter.data = parameter.data.float()
    losses = []
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch("right"), use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert abs(losses[1] - exact) < 2 * abs(losses[0] - exact) + 0.02 * exact
    expected = gradients(plain)
    for name, gradient in gradients(ours).items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, expected[name]) < 0.15, name
    assert bool(lines) == (weights == torch.bfloat16), "weights in another dtype take transformers' layers"


def test_layers_that_cant_be_fast_lie_in_the_line_all_the_same():
    plain, ours = both("llama")
    for model in (plain, ours):
        model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
    for name in ("right", "packed"):
        inputs = batch(name)
        assert ours(**inputs).loss.item() == pytest.approx(plain(**inputs, use_cache=False).loss.item(), rel=1e-5)


def test_a_trained_head_and_no_supervised_token():
    plain, ours = both("llama", with_peft=False)
    inputs = batch("right")
    for model in (plain, ours):
        model.lm_head.weight.requires_grad_(True)
        model(**inputs).loss.backward()
    assert relative_error(ours.lm_head.weight.grad, plain.lm_head.weight.grad) < 1e-5
    _, ours = both("llama")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = ours(**inputs, num_items_in_batch=5).loss
    loss.backward()
    assert loss.item() == 0
    assert ours(**inputs).loss.isnan()


def test_what_cant_be_accelerated_is_said(caplog):
    from transformers import AutoModelForCausalLM, GPT2Config

    phinetune.accelerate(AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2)))
    assert "stays as it is" in caplog.text
    phinetune.accelerate(tiny_model("llama", "sdpa", attention_dropout=0.1))
    assert "batches stay padded" in caplog.text


def test_lines():
    ids = torch.arange(1, 9).view(2, 4)
    line = line_of(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), None)
    assert line.ids.tolist() == [[3, 4, 5, 6, 7, 8]] and line.position_ids.tolist() == [[2, 3, 0, 1, 2, 3]]
    assert line.paths == [[(0, 2)], [(2, 6)]] and line.places.tolist() == [2, 3, 4, 5, 6, 7]
    line = line_of(ids, torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]), None)
    assert line.paths == [[(0, 2)]] and line.places.tolist() == [4, 5]
    assert line_of(ids, torch.zeros(2, 4), None) is None
    assert line_of(ids, torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), None) is None
    assert line_of(ids, torch.ones(2, 1, 4, 4), None) is None
    line = line_of(ids, None, torch.tensor([[0, 1, 0, 1]]))
    assert line.paths == [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)]] and line.places is None
    line = line_of(ids.view(1, 8), None, None, torch.tensor([0, 3, 8], dtype=torch.int32))
    assert line.paths == [[(0, 3)], [(3, 8)]] and line.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=12):
        generator = torch.Generator().manual_seed(9)
        self.rows = [torch.randint(3, 500, (4 + 3 * i % 25,), generator=generator) for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


def pad(rows):
    pads = {"input_ids": 0, "labels": -100}
    found = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in pads.items()
    }
    return {**found, "attention_mask": (found["labels"] != -100).long()}


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINER = {
    "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5, "gradient_accumulation_steps": 2,
    "num_train_epochs": 2, "learning_rate": 3e-3, "logging_steps": 1, "use_cpu": True, "report_to": [], "seed": 1,
    "save_strategy": "no", "disable_tqdm": True, "eval_strategy": "epoch", "max_grad_norm": 1.0,
}  # fmt: skip


def test_in_transformers_trainer(tmp_path, lines):
    histories = []
    for model in both("llama"):
        arguments = TrainingArguments(output_dir=str(tmp_path), **TRAINER)
        trainer = Trainer(model, arguments, pad, train_dataset=Rows(), eval_dataset=Rows(5))
        losses = losses_of(trainer)
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        histories.append(losses + evaluated)
    assert lines and len(histories[0]) == 4 + 2
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


@pytest.mark.trl
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("padding_free", [False, True])
def test_in_trls_trainer(tmp_path, smollm2_tokenizer, padding_free, lines):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from phinetune.trl import ModelLoss

    class OwnLossTrainer(ModelLoss, trl.SFTTrainer):
        pass

    rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in Rows().rows]})
    settings = {**TRAINER, "max_length": None, "padding_free": padding_free, "bf16": False}

    def trained(model, kind=trl.SFTTrainer):
        arguments = trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **settings)
        trainer = kind(model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=smollm2_tokenizer)
        losses = losses_of(trainer)
        return losses + [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    plain, ours = both("llama", vocab_size=49152)
    expected = trained(plain)
    assert not lines and len(expected) == 4 + 2
    for kind in (trl.SFTTrainer, OwnLossTrainer):
        assert trained(copy.deepcopy(ours), kind) == pytest.approx(expected, rel=1e-4)
        assert lines
        lines.clear()
    logits = []
    ours.base_model.model.register_forward_hook(lambda module, given, output: logits.append(output.logits))
    arguments = trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **settings)
    named = {"args": arguments, "eval_dataset": rows, "train_dataset": rows, "processing_class": smollm2_tokenizer}
    OwnLossTrainer(ours, **named).evaluate()
    assert logits and not any(one is not None for one in logits), "a loss alone needs none"
    unlearnt = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
    assert OwnLossTrainer(ours, **named).compute_loss(ours, unlearnt).item() == 0, "as in TRL"


def test_a_window_that_llama_does_not_have():
    model = tiny_model("llama", "sdpa", sliding_window=6).eval()
    ids = torch.randint(3, 500, (1, 40))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = phinetune.accelerate(copy.deepcopy(model))(ids, use_cache=False).logits
    assert relative_error(found, expected) < 1e-5


def test_no_mask_of_all_tokens_by_all_tokens(monkeypatch):
    model = phinetune.accelerate(tiny_model("phi3", "sdpa")).train()
    monkeypatch.setattr(attention, "sdpa_mask", lambda *given, **named: pytest.fail("a mask was made"))
    attention.register()
    ids = torch.randint(3, 500, (3, 20))
    try:
        model(input_ids=ids, labels=ids).loss.item()
    finally:
        monkeypatch.undo()
        attention.register()


def test_norms_of_another_kind_are_theirs():
    ids = torch.randint(3, 500, (2, 20))
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT doesn't know this norm
        plain = peft.get_peft_model(tiny_model("llama", "sdpa"), config)
    for name, parameter in plain.named_parameters():
        if "ln_tuning" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    fast = phinetune.accelerate(copy.deepcopy(plain)).train()
    assert relative_error(fast(input_ids=ids, labels=ids).loss, plain.train()(input_ids=ids, labels=ids).loss) < 1e-6


def test_another_activation_is_its_own():
    ids = torch.randint(3, 500, (2, 20))
    plain = tiny_model("llama", "sdpa").train()
    for layer in plain.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    expected = plain(input_ids=ids, labels=ids).loss
    assert relative_error(phinetune.accelerate(plain)(input_ids=ids, labels=ids).loss, expected) < 1e-6


def test_layers_go_by_the_names_of_their_bases():
    model = phinetune.accelerate(tiny_model("phi3", "sdpa"))
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules) & {"Phi3DecoderLayer"}
    again = pickle.loads(pickle.dumps(model.model.layers[0]))
    assert type(again) is type(model.model.layers[0])


def test_noise_by_the_shape_of_embeddings_is_of_the_batch():
    """transformers' NEFTune divides by the row's width."""
    ids, mask = torch.randint(3, 500, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :20] = 0
    labels = ids.masked_fill(mask.roll(1, 1) * mask == 0, -100)  # padding predicts nothing
    model = phinetune.accelerate(tiny_model("llama", "sdpa")).train()
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, given, out: shapes.append(tuple(out.shape[:2])))
    model(input_ids=ids, attention_mask=mask, labels=labels)
    hook.remove()
    assert shapes == [(2, 30)]
    model.enable_input_require_grads()
    hook = model.model.layers[0].register_forward_pre_hook(lambda m, given: shapes.append(tuple(given[0].shape[:2])))
    model(input_ids=ids, attention_mask=mask, labels=labels)
    assert shapes[1] == (1, 40), "what only asks for gradients doesn't mind the line"


def test_an_adapter_for_each_row():
    torch.manual_seed(0)
    plain = peft.get_peft_model(tiny_model("llama", "sdpa"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    plain.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    ids = torch.randint(3, 500, (2, 20))
    asked = {"adapter_names": ["default", "other"], "use_cache": False}
    with torch.no_grad():
        expected = plain.eval()(input_ids=ids, **asked).logits
        found = phinetune.accelerate(plain)(input_ids=ids, **asked).logits
    assert relative_error(found, expected) < 1e-5


def test_logits_of_some_places_while_it_trains():
    ids, places = torch.randint(3, 500, (2, 20)), torch.tensor([3, 7, 19])
    model = tiny_model("llama", "sdpa").train()
    expected = model(input_ids=ids, logits_to_keep=places).logits
    found = phinetune.accelerate(model)(input_ids=ids, logits_to_keep=places).logits
    assert relative_error(found, expected) < 1e-5


def attends_by_its_mask(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    """An attention that reads the mask itself, as patches for long contexts do."""
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
    k, v = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=attention_mask is None)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("how", ["a forward of its own", "a class of its own", "not causal"])
@pytest.mark.parametrize("kind", ["right", "no mask"])
def test_an_attention_that_isnt_transformers_own_is_called(how, kind, lines):
    plain = plain_model("llama")
    for layer in plain.get_base_model().model.layers:
        if how == "a forward of its own":
            layer.self_attn.forward = types.MethodType(attends_by_its_mask, layer.self_attn)
        elif how == "a class of its own":
            layer.self_attn.__class__ = type("Mine", (LlamaAttention,), {"forward": attends_by_its_mask})
        else:
            layer.self_attn.is_causal = False
    ours = phinetune.accelerate(plain_model("llama"))
    for layer, other in zip(ours.get_base_model().model.layers, plain.get_base_model().model.layers, strict=True):
        layer.self_attn = copy.deepcopy(other.self_attn)
        if how == "a forward of its own":
            layer.self_attn.forward = types.MethodType(attends_by_its_mask, layer.self_attn)
    inputs = batch(kind)
    assert ours(**inputs).loss.item() == pytest.approx(plain(**inputs, use_cache=False).loss.item(), rel=1e-5)
    assert not lines


def test_places_of_answers_are_over_padding_too():
    """Softmax over a row's places, in the model for extractive answers."""
    torch.manual_seed(0)
    plain = LlamaForQuestionAnswering._from_config(tiny_config("llama", 500), attn_implementation="sdpa").train()
    ours = phinetune.accelerate(copy.deepcopy(plain))
    inputs = {name: value for name, value in batch("right").items() if name != "labels"}
    inputs |= {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 5, 6, 7])}
    assert ours(**inputs).loss.item() == pytest.approx(plain(**inputs).loss.item(), rel=1e-6)


def test_a_pickled_model_is_read_by_a_new_process(tmp_path):
    model = phinetune.accelerate(plain_model("llama", with_peft=False))
    torch.save(model, tmp_path / "whole.pt")
    inputs = batch("right")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        f"import torch; model = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False);"
        f"print(model(**torch.load({str(tmp_path / 'inputs.pt')!r})).loss.item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(model(**inputs).loss.item(), rel=1e-6)


def test_modules_that_a_device_map_has_given_forwards_stay_as_they_are(caplog, lines):
    plain, ours = plain_model("llama"), plain_model("llama")
    for layer in ours.get_base_model().model.layers:  # as accelerate's hooks do
        layer.forward = functools.partial(LlamaDecoderLayer.forward, layer)
    layers = list(ours.get_base_model().model.layers)
    phinetune.accelerate(ours)
    assert "a forward of their own" in caplog.text
    assert list(ours.get_base_model().model.layers) == layers, "whoever holds a layer goes on holding it"
    inputs = batch("right")
    assert ours(**inputs).loss.item() == pytest.approx(plain(**inputs, use_cache=False).loss.item(), rel=1e-5)
    assert not lines


def test_labels_that_padding_predicts_are_said_once(caplog):
    model = phinetune.accelerate(tiny_model("llama", "sdpa")).train()
    inputs = batch("left")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # a collator's
    model(**inputs), model(**inputs)
    assert caplog.text.count('tokenizer.padding_side = "right"') == 1
    seen = []
    model.loss_function = lambda logits, labels, vocab_size: seen.append(logits.shape) or logits.sum()
    model(**inputs)
    assert len(seen) == 1, "a loss of the caller's gets what transformers gives it"


def test_checkpoints_that_keep_products(lines):
    plain, ours = both("llama")
    inputs = batch("right")
    keeping = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    for model in (plain, ours):
        model.enable_input_require_grads()
        for layer in model.get_base_model().model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False, context_fn=keeping)
        model(**inputs).loss.backward()
    assert not lines
    expected = gradients(plain)
    for name, gradient in gradients(ours).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("how", ["a hook on A", "a global hook", "two dropouts"])
def test_what_pefts_layers_do_more_is_done(how, lines):
    plain, ours = both("llama")
    inputs, calls, handles = batch("right"), [], []
    if how == "two dropouts":
        for model in (plain, ours):
            model.add_adapter("other", peft.LoraConfig(r=2, lora_dropout=1e-9, target_modules="all-linear"))
            model.base_model.set_adapter(["default", "other"])
    elif how == "a hook on A":
        layer = ours.get_base_model().model.layers[1].self_attn.q_proj
        handles = [layer.lora_A["default"].register_forward_hook(lambda *call: calls.append(call))]
    else:
        handles = [torch.nn.modules.module.register_module_forward_hook(lambda *call: calls.append(call))]
    loss = ours(**inputs).loss.item()
    for handle in handles:
        handle.remove()
    assert loss == pytest.approx(plain(**inputs, use_cache=False).loss.item(), rel=1e-5)
    assert bool(calls) == (how != "two dropouts")
    assert len(lines) == (1 if how == "a hook on A" else 0)
