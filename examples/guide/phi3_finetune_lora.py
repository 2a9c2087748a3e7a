# %% [markdown]
# # Python code from Phi-3, with LoRA
#
# After the cookbook's `Phi-3-finetune-lora-python.ipynb`.
#
# **What was broken.** Phi-3 keeps query, key and value in one layer, gate and up in another. Of the seven names in
# `target_modules` only `o_proj` and `down_proj` are layers of their own, so PEFT adapts these two and leaves the rest,
# without a word: 8,912,896 parameters train where 29,884,416 were meant. `SFTTrainer` no longer takes `tokenizer`,
# `max_seq_length` or `dataset_text_field`, `datasets.load_metric` is gone, and the model's own code, which
# `trust_remote_code=True` loads, doesn't run with today's transformers. The loss is over the questions too. Merging
# keeps an `auto_map` that breaks the next load.
#
# **What changed.** The seven names mean what they say. Rank, alpha, dropout, learning rate, epochs, the share of 5 %
# that is held out, 512 tokens, W&B and ROUGE on held-out rows are the notebook's.

# %%
import os

import torch
from transformers import AutoModelForCausalLM, Phi3Config, pipeline

import phinetune
from phinetune import lora
from phinetune.model import fused_parts

MODEL = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")  # MODEL=smollm2 needs no network
DATA = os.environ.get(
    "DATA", "phinetune:orders/train" if MODEL == "smollm2" else "iamtarun/python_code_instructions_18k_alpaca"
)
if MODEL == "smollm2":
    os.environ.setdefault("WANDB_MODE", "offline")  # the run's folder keeps what would be sent

lora_r = 16
lora_alpha = 16
lora_dropout = 0.05
target_modules = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]

# %% [markdown]
# ## What the target list means on Phi-3
#
# Phi-3-mini at full size, without its weights.

# %%
with torch.device("meta"):
    phi3 = AutoModelForCausalLM.from_config(Phi3Config())
names = lora.adapt(phi3, target_modules, r=lora_r, lora_alpha=lora_alpha, fused=fused_parts(phi3.config))
lora.mark_only_lora_as_trainable(phi3)
trainable = sum(parameter.numel() for parameter in phi3.parameters() if parameter.requires_grad)
print(f"{trainable:,} trainable parameters in {len(names)} layers:", *names[:4], "…")

# %% [markdown]
# ## Training
#
# Rows of `instruction`, `input` and `output` are read as they are. What is learnt of each is the answer.

# %%
run = phinetune.finetune(
    model=MODEL,
    train=DATA,
    eval=0.05,
    data={"max_length": 512, "max_rejected": 0.2},  # the notebook cut longer rows; here they are listed
    training_config={
        "output_dir": "runs/phi-3-mini-LoRA",
        "evaluation_strategy": "steps",
        "do_eval": True,
        "optim": "adamw_torch",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 8,
        "log_level": "debug",
        "save_strategy": "epoch",
        "logging_steps": 100,
        "learning_rate": 1e-4,
        "eval_steps": 100,
        "num_train_epochs": 3,
        "warmup_ratio": 0.1,
        "lr_scheduler_type": "linear",
        "report_to": "wandb",
        "project": "Phi3-mini-ft-python-code",
        "run_name": "phi-3-mini-ft-py-3e",
        "seed": 42,
    },
    peft_config={
        "r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "task_type": "CAUSAL_LM",
        "target_modules": target_modules,
    },
    evaluation={"metrics": ["rouge1", "rouge2", "rougeL", "rougeLsum"], "max_new_tokens": 256},
    overwrite=True,
)

# %% [markdown]
# ## ROUGE on the held-out rows, before and after
#
# With 95 % confidence, over the rows. `phinetune evaluate` takes it again, and other metrics.

# %%
for metric, tuned in run.summary["tuned"].items():
    low, high = run.summary["confidence_95"][metric]["difference"]
    print(f"{metric:10} {run.summary['base'][metric]:7.3f} {tuned:7.3f}   difference {low:+.3f} to {high:+.3f}")

# %% [markdown]
# ## Merging
#
# Added up in float32 and rounded once, shard by shard. The folder is a plain model, read without PEFT and phinetune.

# %%
merged = phinetune.merge(run.folder, "runs/phi-3-mini-LoRA-merged", overwrite=True)
print(sorted(path.name for path in merged.iterdir()))

# %%
chat = pipeline("text-generation", model=str(merged))
held_out = run.comparison.answers[0]
print("asked   ", held_out.question)
print("expected", held_out.expected)
print("answer  ", chat(held_out.messages, max_new_tokens=256, do_sample=False)[0]["generated_text"][-1]["content"])

# %% [markdown]
# ## To the Hub
#
# `phinetune.push(run.folder, "me/phi-3-mini-LoRA")` puts adapter and model card there. This is the card.

# %%
print(phinetune.model_card(run.folder, "me/phi-3-mini-LoRA"))
