"""The LoRA family through whole runs: what a recipe asks for trains, resumes bit for bit, is read back and by PEFT."""

import json

import peft
import pytest
import torch
from conftest import tiny_config, tiny_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

import phinetune
from phinetune import lora
from phinetune.adapter import load_tuned
from phinetune.model import adapt_model, load_model
from phinetune.recipe import ModelKwargs, PeftConfig, TrainingConfig, make_recipe
from phinetune.train import train
from phinetune.train.optimiser import parameter_groups

VARIANTS = {
    "dora": {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
    "pissa": {"init_lora_weights": "pissa", "loraplus_lr_ratio": 4.0},
    "olora, layers": {
        "init_lora_weights": "olora",
        "layers_to_transform": [1],
        "target_modules": ["q_proj", "up_proj"],
    },
    "embeddings, head, biases": {
        "target_modules": ["embed_tokens", "v_proj"],
        "modules_to_save": ["lm_head"],
        "bias": "lora_only",
        "loraplus_lr_ratio": 8.0,
    },
}


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory, smollm2_tokenizer):
    """A small random Llama whose attention has biases, and whose head is tied to its embeddings."""
    folder = tmp_path_factory.mktemp("biased-llama")
    model = tiny_model("llama", "sdpa", tie_word_embeddings=True, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.normal_(0, 0.1)
    model.save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of what is asked for
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumes_bit_for_bit_and_its_adapter_is_pefts(variant, biased_folder, chats, tmp_path):
    def recipe(output):
        training_config = {
            "output_dir": str(tmp_path / output), "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
            "learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True,
        }  # fmt: skip
        return make_recipe(
            {
                "model": str(biased_folder),
                "model_kwargs": {"dtype": "float32"},
                "data": {"train": str(chats), "eval": 0.1},
                "training_config": training_config,
                "peft_config": {"r": 4, "lora_alpha": 8, **VARIANTS[variant]},
            }
        )[0]

    whole = train(recipe("whole"))
    assert whole.summary["tuned"]["eval_loss"] != whole.summary["base"]["eval_loss"]
    again = train(recipe("again"), resume=tmp_path / "whole" / "checkpoint-3")
    files = [run.folder / "adapter_model.safetensors" for run in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [
        [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] for run in (whole, again)
    ]
    losses = [[line["loss"] for line in own if "loss" in line and line["step"] > 3] for own in lines]
    assert losses[0] == losses[1]
    first = [line["loss"] for line in lines[0] if "loss" in line]
    assert len(set(first)) == 6

    tuned, _ = load_tuned(whole.folder, ModelKwargs(dtype="float32"))
    theirs = load_model(str(biased_folder), ModelKwargs(dtype="float32")).eval()
    ids = torch.randint(3, 900, (1, 11))
    with torch.no_grad():
        base = theirs(ids).logits
        theirs = peft.PeftModel.from_pretrained(theirs, whole.folder)
        torch.testing.assert_close(tuned(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        assert (tuned(ids).logits - base).abs().max() > 1e-4
        with lora.disabled(tuned):
            torch.testing.assert_close(tuned(ids).logits, base, rtol=1e-6, atol=1e-6)
    keys = load_file(files[0]).keys()
    assert any("lm_head.weight" in key for key in keys) == ("modules_to_save" in VARIANTS[variant])
    assert any("v_proj.base_layer.bias" in key for key in keys) == ("bias" in VARIANTS[variant])


def test_loraplus_groups_are_pefts():
    settings = {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "use_dora": True}
    config = TrainingConfig(learning_rate=1e-3, weight_decay=0.1)
    peft_config = PeftConfig(**settings, loraplus_lr_ratio=16, loraplus_lr_embedding=2e-5)
    ours = tiny_model("llama")
    adapt_model(ours, peft_config, seed=1)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    found = {
        names[id(parameter)]: (1e-3 * group["lr_factor"], group["weight_decay"])
        for group in parameter_groups(ours, config, peft_config)
        for parameter in group["params"]
    }
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=2e-5
    )
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    expected = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.").replace("lora_embedding_", "lora_")
            expected[name.replace(".default", "").removesuffix(".weight")] = (group["lr"], group["weight_decay"])
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == pytest.approx(expected[name]), name


def test_a_language_model_inside_a_multimodal_one(tmp_path, smollm2_tokenizer, chats):
    """Whose sizes stand in a configuration of their own (Gemma 3)."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={name: text[name] for name in names},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=40000,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3")
    smollm2_tokenizer.save_pretrained(tmp_path / "gemma3")
    run = phinetune.finetune(
        model=str(tmp_path / "gemma3"), train=str(chats), eval=0.1,
        training_config={"output_dir": str(tmp_path / "run"), "max_steps": 2, "use_cpu": True, "learning_rate": 2e-3},
        peft_config={"r": 2, "exclude_modules": ".*vision_tower.*"},
    )  # fmt: skip
    assert run.summary["tuned"]["eval_loss"] < run.summary["base"]["eval_loss"]


def test_a_model_whose_layers_cant_be_recomputed(tmp_path, smollm2_tokenizer, chats, caplog):
    from transformers import AutoModelForCausalLM, OpenAIGPTConfig

    config = OpenAIGPTConfig(vocab_size=49152, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt")
    smollm2_tokenizer.save_pretrained(tmp_path / "gpt")
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True}
    run = phinetune.finetune(
        model=str(tmp_path / "gpt"), train=str(chats), peft_config={"r": 2},
        training_config={**training, "gradient_checkpointing_layers": 1},
    )  # fmt: skip
    assert run.summary["steps"] == 1
    assert "models can't recompute their layers" in caplog.text
