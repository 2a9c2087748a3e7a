"""`phinetune init`: a recipe from what the data and the machine are like."""

from pathlib import Path

from phinetune.cli.paths import check_output
from phinetune.errors import DataError, RecipeError

# Bytes of memory below which Phi-3-mini in bfloat16 (7.6 GB of weights) is not proposed.
ENOUGH_FOR_PHI3 = 14 * 10**9
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
DTYPES = {
    "auto": "auto                     # bfloat16, or float32 where this CPU is faster in it",
    "bfloat16": "bfloat16                 # 7.6 GB of weights; in float32 twice as much",
}
ROWS_FOR_A_SHARE = 40  # below this many rows, nothing is held out

TEMPLATE = """\
# Written by `phinetune init {data}`: {rows} chats, {messages} messages, the longest of some {longest} tokens.
# Change what you like, then:  phinetune train {output}

model: {model}{model_note}
model_kwargs:
  dtype: {dtype}

data:
  train: {data}
  eval: {eval}{eval_note}
  max_length: {max_length}              # tokens; a longer row is left out and listed, never cut
  max_rejected: 0.01              # the run ends before it starts when more of the rows can't be used

training_config:                  # names of TrainingArguments
  output_dir: {output_dir}
  learning_rate: 2.0e-4
  lr_scheduler_type: cosine
  warmup_steps: 0.05              # below 1: a share of all steps
  num_train_epochs: {epochs}             # passes over the rows
  per_device_train_batch_size: {batch}  # rows an update
  gradient_checkpointing_layers: auto   # as few layers are recomputed as the memory asks for
  logging_steps: 10
{eval_strategy}  save_strategy: epoch            # resume with: phinetune train {output} --resume
  seed: 42

peft_config:                      # names of LoraConfig
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: all-linear

evaluation:
  metrics: []                     # [exact_match, rougeL, bleu, json_valid]: greedy answers beside the held-out ones
"""


def write_recipe(data: Path, output: Path, model: str | None, overwrite: bool) -> None:
    from phinetune.data import Rejected, read_rows, row_to_json
    from phinetune.data.policies import check
    from phinetune.hub import hub_answers
    from phinetune.recipe import DataConfig

    check_output(output)
    if output.exists() and not overwrite:
        raise RecipeError(str(output), "is there already", "use --overwrite or another --output")
    rows = messages = longest = rejected = 0
    some_rejected: list[Rejected] = []
    config = DataConfig(train=str(data))
    for read in read_rows(str(data)):
        checked = read if isinstance(read, Rejected) else check(read, config)
        if isinstance(checked, Rejected):
            rejected, some_rejected = rejected + 1, [*some_rejected, checked][:5]
            continue
        row = checked[0]
        # Some 3 bytes a token is low for English, and high for scripts that a vocabulary spells byte by byte.
        rows, messages = rows + 1, messages + len(row.messages)
        longest = max(longest, len(row_to_json(row)) // 3)
    if not rows:
        first = some_rejected[0] if some_rejected else None
        what = f"holds no usable chat ({first.where} {first.reason})" if first else "holds no rows"
        raise DataError(str(data), what, 'write one {"messages": [{"role": …, "content": …}]} a line')

    note = ""
    if model is None:
        model = PHI3 if _machine_memory() >= ENOUGH_FOR_PHI3 and hub_answers() else "smollm2"
        note = "  # or microsoft/Phi-3-mini-4k-instruct, a local folder, a .gguf file" if model == "smollm2" else ""
    share = rows >= ROWS_FOR_A_SHARE
    text = TEMPLATE.format(
        data=_yaml(data),
        output=output,
        rows=rows,
        messages=messages,
        longest=longest,
        model=_yaml(model),
        model_note=note,
        dtype=DTYPES["bfloat16" if model == PHI3 else "auto"],
        eval="0.05" if share else "0",
        eval_note="                      # share held out; never trained on"
        if share
        else "  # too few rows to hold some out",
        max_length=max(256, 1 << (longest - 1).bit_length()),
        output_dir=_yaml(f"runs/{_run_name(data)}"),
        epochs=3 if rows < 5000 else 1,
        batch=4 if rows < 1000 else 8,
        eval_strategy="  eval_strategy: epoch            # the held-out loss after each pass\n" if share else "",
    )
    output.write_text(text, encoding="utf-8")
    print(f"{data}: {rows} chats can be used, {rejected} can't")
    for left_out in some_rejected:
        print(f"  left out {left_out.where}: {left_out.reason}")
    print(f"wrote {output} for {model}; next:  phinetune train {output}")


def _yaml(text: object) -> str:
    """A path or name as YAML reads it back, in quotes where it must be."""
    import yaml

    return yaml.safe_dump(str(text), allow_unicode=True, width=10**6).removesuffix("...\n").strip()


def _run_name(data: Path) -> str:
    """What the data is called: a file without its suffix, a folder, or the one that a pattern is in."""
    while not data.exists() and any(sign in data.name for sign in "*?["):
        data = data.parent
    data = data.resolve() if data.name in ("", "..") else data
    return "mine" if str(data) in ("-", data.anchor) else data.name if data.is_dir() else data.stem


def _machine_memory() -> int:
    """Bytes of what this process may use of the machine's memory, or of the first GPU's."""
    import torch

    from phinetune.machine.memory import memory_total

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return memory_total()
