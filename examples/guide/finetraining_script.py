# %% [markdown]
# # The fine-tuning script
#
# After the cookbook's `FineTrainingScript.py`.
#
# **What was broken.** It imports nothing, the names of data set and output are defined nowhere, and that of the
# tokenizer is misspelt. `evaluation_strategy="steps"` without held-out rows raises. SFTTrainer no longer takes
# `dataset_text_field` and `max_seq_length`. The chat is written with made-up markers in place of Phi-3's own, and cut
# at 128 tokens. All 3.8 billion parameters would be trained, in several times the 7.4 GB that its head names.
#
# **What changed.** The training arguments are the script's own, pasted in; what has another name today, or none, is
# reported when it runs. The rows are read as they are, up to 2,048 tokens, one in twenty is held out, and what trains
# is a LoRA adapter.

# %%
import os

import phinetune

MODEL = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")  # MODEL=smollm2 needs no network
DATA = os.environ.get("DATA", "phinetune:orders/train" if MODEL == "smollm2" else "macadeliccc/opus_samantha")
NEW_MODEL_NAME = "runs/finetraining-script"

# %%
args = dict(
    evaluation_strategy="steps",
    per_device_train_batch_size=7,
    gradient_accumulation_steps=4,
    gradient_checkpointing=True,
    learning_rate=1e-4,
    fp16=True,
    max_steps=-1,
    num_train_epochs=3,
    save_strategy="epoch",
    logging_steps=10,
    output_dir=NEW_MODEL_NAME,
    optim="paged_adamw_32bit",
    lr_scheduler_type="linear",
)

run = phinetune.finetune(
    model=MODEL,
    train=DATA,
    eval=0.05,
    data={"max_length": 2048, "max_rejected": 0.1},
    training_config=args,
    peft_config={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    overwrite=True,
)

# %%
print(f"{run.summary['steps']} steps on {run.summary['rows']} rows in {run.summary['seconds']} s")
print(f"held-out loss: {run.summary['base']['eval_loss']:.3f} before, {run.summary['tuned']['eval_loss']:.3f} after")
print(f"adapter, checkpoints, report.html: {run.folder}")
