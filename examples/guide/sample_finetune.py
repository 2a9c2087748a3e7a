# %% [markdown]
# # The model card's sample
#
# After `sample_finetune.py` on the model card of Phi-3-mini. Its two dictionaries stand below as they stand there.
#
# **What was broken.** `TrainingArguments` no longer takes `overwrite_output_dir` and `warmup_ratio`; SFTTrainer no
# longer takes `max_seq_length`, `dataset_text_field`, `tokenizer` and `packing`. The model's own code
# (`trust_remote_code=True`) fails on today's cache. flash-attention needs a GPU. The loss is over all tokens, questions
# too; packed rows see each other. A crash while a checkpoint is written leaves half of one, of which a resumption dies,
# and the script never resumes. The tuned model is neither merged nor asked.
#
# **What changed.** Nothing in the two dictionaries: each name is honoured, or what became of it is said. Packed rows
# see only themselves, and the two newest checkpoints stay. Answers are what is learnt; `data={"supervise": "all"}`
# would be the sample's way.

# %%
import os

import phinetune

MODEL = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")  # MODEL=smollm2 needs no network
DATA = os.environ.get("DATA", "phinetune:orders/train" if MODEL == "smollm2" else "HuggingFaceH4/ultrachat_200k")

# %%
# fmt: off
###################
# Hyper-parameters
###################
training_config = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs":{"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
    }

peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}
# fmt: on

# %% [markdown]
# ## Training and evaluation
#
# The sample's arguments of SFTTrainer, `max_seq_length=2048` and `packing=True`, stand where they belong today. It
# trains on the split `train_sft` and tests on `test_sft`; the shipped example has a test set of its own, too.

# %%
if DATA == "HuggingFaceH4/ultrachat_200k":
    train, test = {"path": DATA, "split": "train_sft"}, {"path": DATA, "split": "test_sft"}
elif DATA == "phinetune:orders/train":
    train, test = DATA, "phinetune:orders/eval"
else:
    train, test = DATA, 0.05

run = phinetune.finetune(
    model=MODEL,
    train=train,
    eval=test,
    data={"max_length": 2048, "excess_length_strategy": "truncate"},
    training_config={**training_config, "packing": True},
    peft_config=peft_config,
)

# %%
print((run.folder / "metrics.jsonl").read_text())
print(f"held-out loss: {run.summary['base']['eval_loss']:.4f} before, {run.summary['tuned']['eval_loss']:.4f} after")

# %% [markdown]
# The sample's docstring has a DeepSpeed ZeRO-3 configuration for four GPUs. phinetune trains on one device; with an
# adapter, Phi-3-mini fits on one (docs/phi3.md).
