# %% [markdown]
# # Phi-3: inference, and a first fine-tune
#
# After the cookbook's `Phi_3_Inference_Finetuning.ipynb`.
#
# **What was broken.** It asks the model without its chat template and prints the prompt with the answer. It promises
# LoRA, QLoRA and GPTQ, and contains none of them: every parameter of the model would be trained, in half precision. It
# asks for evaluations (`evaluation_strategy="steps"`) and has nothing to evaluate on, which raises. Turns are written
# with made-up markers and the number 32000 behind them, where the token was meant; rows are cut at 128 tokens without a
# word. The tuned model is never asked.
#
# **What changed.** The chat template writes prompts and rows; `load` sets the tokens at which an answer ends. What
# trains is a LoRA adapter. Rows that are too long are listed, not cut; one row in twenty is held out. The run's folder
# holds all that came of it, and the tuned model answers at the end.

# %%
import os

from transformers import pipeline, set_seed

import phinetune

MODEL = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")  # MODEL=smollm2 needs no network
DATA = os.environ.get("DATA", "phinetune:orders/train" if MODEL == "smollm2" else "macadeliccc/opus_samantha")

set_seed(2024)

# %% [markdown]
# ## Inference

# %%
prompt = "Write a C# code that reads the content of multiple text files and save the result as CSV"

model, tokenizer = phinetune.load(MODEL)
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)


def answer(messages: list[dict[str, str]], **options: object) -> str:
    return chat(messages, **options)[0]["generated_text"][-1]["content"]


print(answer([{"role": "user", "content": prompt}], do_sample=True, max_new_tokens=120))

# %% [markdown]
# ## Fine-tuning
#
# ShareGPT's `conversations[{from, value}]` are read as they are, and so is every other usual form. The settings are the
# notebook's own; what it says of old names, and of `bf16`, is printed. `max_length` was 128 there.

# %%
is_local = os.path.exists(DATA) or DATA.startswith("phinetune:")
if is_local:
    train = DATA
else:
    from datasets import load_dataset

    train = load_dataset(DATA, split="train").select(range(100))  # a subset, for speed

del model, chat  # the run loads its own
run = phinetune.finetune(
    model=MODEL,
    train=train,
    eval=0.05,
    data={"max_length": 2048, "max_rejected": 0.1},
    training_config={
        "evaluation_strategy": "steps",
        "per_device_train_batch_size": 7,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "learning_rate": 1e-4,
        "bf16": True,
        "max_steps": -1,
        "num_train_epochs": 3,
        "save_strategy": "epoch",
        "logging_steps": 10,
        "output_dir": "runs/New-Model-phi-3-mini-4k",
        "optim": "paged_adamw_32bit",
        "lr_scheduler_type": "linear",
    },
    peft_config={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    overwrite=True,
)

# %%
print(f"held-out loss: {run.summary['base']['eval_loss']:.3f} before, {run.summary['tuned']['eval_loss']:.3f} after")
print("written:", ", ".join(sorted(path.name for path in run.folder.iterdir())))

# %% [markdown]
# ## The tuned model
#
# The folder is an adapter in PEFT's format. `phinetune chat` talks to it on the command line.

# %%
model, tokenizer = phinetune.load(run.folder)
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
if DATA.startswith("phinetune:"):  # what the embedded model was tuned on
    told = 'Write the order as JSON. "Two large iced mochas to go" is {"quantity": 2, "item": "large iced mochas", '
    told += '"serve": "to go"}'
    asked = [{"role": "system", "content": told}, {"role": "user", "content": "Three small lentil pretzels to go"}]
else:
    asked = [{"role": "user", "content": "What do you feel when you look at the sea?"}]
print(answer(asked, do_sample=False, max_new_tokens=120))
