"""What a run is asked to do: one typed model a section of the recipe.

The names in `training_config` are those of transformers' TrainingArguments and TRL's SFTConfig, the
names in `peft_config` those of PEFT's LoraConfig.  Unknown names never get here: `names.py` turns them
into an error, a mapped name or a warning first.
"""

import datetime
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

FROM_PYTHON = "rows from Python"  # how a recipe calls data that came as objects
DATA_TYPES = ("auto", "bfloat16", "float32", "float16", "float64")
Share = Annotated[float, Field(ge=0, lt=1)]
FolderName = Annotated[str, AfterValidator(os.path.expanduser)]
WarmupSteps = Annotated[float, Field(ge=0)]
Policy = Literal["keep", "drop", "raise"]
# YAML reads a bare `no` as false.
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(lambda value: "no" if value is False else value)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), use_attribute_docstrings=True
    )


ANSWER_METRICS = ("exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "json_valid", "json_fields")


def _known_dtype(value: str) -> str:
    name = value.removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "float": "float32", "half": "float16"}.get(
        name, name
    )
    if name not in DATA_TYPES:
        raise ValueError(f"must be one of {', '.join(DATA_TYPES)}")
    return name


def _numbers(value: Any) -> Any:
    """A mapping whose `1e-5` is a number, which YAML reads as text; nothing is none."""
    if not isinstance(value, dict):
        return {} if value is None else value
    return {name: _number(given) if isinstance(given, str) else given for name, given in value.items()}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _not_reentrant(value: dict[str, Any]) -> dict[str, Any]:
    others = {name: given for name, given in value.items() if (name, given) != ("use_reentrant", False)}
    if others:
        raise ValueError("only use_reentrant: false is there, whose gradients are exact")
    return value


def _no_code_from_hub(value: str) -> str:
    if "/" in value:
        raise ValueError("names a kernel on the Hub, whose code would be run: name one of transformers' own")
    return value


def _known_metric(value: str) -> str:
    if value.removeprefix("eval_") not in ("loss", "perplexity"):
        raise ValueError("must be eval_loss or perplexity")
    return value


def _known_answer_metric(value: str) -> str:
    file, _, name = value.rpartition(":")
    if value not in ANSWER_METRICS and not (file.endswith(".py") and name.isidentifier()):
        raise ValueError(f"must be one of {', '.join(ANSWER_METRICS)}, or FILE.py:NAME")
    return value


def _day(value: Any) -> str | None:
    return None if value is None else datetime.date.fromisoformat(str(value)).isoformat()


def _loggers(value: Any) -> list[Any]:
    names = [value] if isinstance(value, str) else list(value or [])
    return [name for name in names if name not in ("none", "all")]


class ModelKwargs(Section):
    """How the base model is loaded (names of `from_pretrained`)."""

    dtype: Annotated[str, BeforeValidator(str), AfterValidator(_known_dtype)] = "auto"
    """Of the base weights. `auto`: bfloat16, or float32 on a CPU on which torch multiplies bfloat16 more slowly, and on
    a GPU that doesn't multiply it (before Ampere)."""
    attn_implementation: Annotated[str, AfterValidator(_no_code_from_hub)] = "auto"
    """`auto`: phinetune's packed attention where the model can take it; else as transformers names it."""
    load_in_8bit: bool = False
    """The decoder layers' weights in 8 bits, half of bfloat16's memory. On a CPU in phinetune's own int8, with faster
    products where it has VNNI or AMX; on a GPU by bitsandbytes, dequantised for each product."""
    load_in_4bit: bool = False
    """QLoRA: the decoder layers' weights in 4 bits by bitsandbytes, on a CPU as on a GPU, a quarter of bfloat16's
    memory; dequantised for each product."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The table of the 16 numbers (transformers' own default is fp4)."""
    bnb_4bit_use_double_quant: bool = True
    """The scales are kept in 8 bits too: 0.4 bits a weight less (transformers' own default is false)."""
    bnb_4bit_compute_dtype: Annotated[str, BeforeValidator(str), AfterValidator(_known_dtype)] = "auto"
    """Of the products with dequantised weights; `auto`: `dtype`. With `dtype: float32` norms, head and what flows
    between layers are in full precision beside it."""
    use_cache: bool = False
    """What the model's configuration says; training never keeps a cache, generation always does."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    token: str | None = None
    """Hub access token; the environment's HF_TOKEN by default."""
    cache_dir: str | None = None
    """Where Hub downloads are kept."""

    @model_validator(mode="after")
    def _one_quantisation(self) -> "ModelKwargs":
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit can't both be true")
        return self


Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "pairs", "text"]
Columns = dict[str, str]


class DataSource(Section):
    """One source of rows, where more is to be said than its path."""

    path: str
    """A file, a folder, a pattern (`data/*.jsonl`), `-` (standard input), `phinetune:NAME/SPLIT`, or a Hub id."""
    split: str | None = None
    """Of a Hub data set; `train` by default."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    name: str | None = None
    """Configuration of a Hub data set."""
    format: Format = "auto"
    """How a row is read; `auto` goes by its columns."""
    columns: Columns | None = None
    """Our name of a column, then the file's: {user: question, assistant: answer, system: context}."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its rows stand in an epoch: 2 is each twice, 0.25 a quarter of them, another quarter in the next."""


Sources = str | DataSource | list[str | DataSource]


class DataConfig(Section):
    """Which rows, and how a row becomes tokens."""

    train: Sources
    """Files of any known format, folders, patterns, Hub ids, `phinetune:orders/train`; or a mapping, or a list."""
    eval: Share | Sources | None = None
    """Held-out rows: the same, or a share of `train` such as 0.05."""
    format: Format = "auto"
    """How rows are read, where a source doesn't say."""
    columns: Columns | None = None
    """Our names of the columns and the files', where a source doesn't say."""
    max_length: PositiveInt = 2048
    """Tokens a row."""
    excess_length_strategy: Literal["drop", "truncate", "split", "raise"] = "drop"
    """A longer row is left out and listed; cut, whole turns first; made into several; or an error."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run ends before it starts when a larger share of the rows can't be used."""
    supervise: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Which tokens are learnt: all assistant turns; the last one; every token, but of a prompt with a completion the
    completion's assistant turns; or every token. A message's `train` is stronger."""
    duplicates: Policy = "keep"
    """Rows that stand in the data before: kept and counted, left out, or an error."""
    held_out_in_train: Policy = "drop"
    """Training rows that are held-out rows too: left out of training, kept, or an error."""
    role_order: Policy = "drop"
    """Rows whose turns don't alternate, or begin with the assistant."""
    empty_turns: Policy = "drop"
    """Rows with an empty user or assistant turn."""
    rewritten_turns: Literal["split", "last", "drop"] = "split"
    """Where the template writes an earlier turn otherwise than a last one (reasoning stripped): the turn becomes an
    example of its own, or isn't learnt, or the row is left out."""
    unwritten_system: Literal["drop", "prepend", "ignore"] = "drop"
    """Where the template doesn't write a system message: the row is left out, the text goes in front of the first
    user message, or the text is left out."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}."""
    today: Annotated[str | None, BeforeValidator(_day)] = None
    """The day that templates which write a date are told, such as 2026-01-31; the day of the run by default."""
    max_batch_tokens: PositiveInt = 1024
    """Tokens laid into one flat batch. Layout only: any value gives the same update, up to dropout's draws."""
    num_proc: PositiveInt | None = None
    """Processes that tokenise; by default one a core that may be used, where the data is large enough for as many."""


class TrainingConfig(Section):
    """How the run goes (names of TrainingArguments)."""

    output_dir: FolderName = "runs/mine"
    """Where everything is written."""
    overwrite_output_dir: bool = False
    """Empties an output folder that holds an earlier run."""
    per_device_train_batch_size: PositiveInt = 4
    """Rows a step (times gradient_accumulation_steps)."""
    per_device_eval_batch_size: PositiveInt = 32
    """Prompts answered at once when answers are evaluated."""
    gradient_accumulation_steps: PositiveInt = 1
    """Multiplies the rows of a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay, on all that trains but biases and norms."""
    adam_beta1: Share = 0.9
    """AdamW's first moment decay."""
    adam_beta2: Share = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw", "paged_adamw_32bit",
        "paged_adamw_8bit",
    ] = "adamw_torch"  # fmt: skip
    """AdamW: torch's own; bitsandbytes' with moments in 8 bits, where a matrix has 4,096 elements and more; paged ones
    move the moments out of a GPU that is short of memory, and are like the others on a CPU."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the rows; may be a fraction."""
    max_steps: int = -1
    """Ends after this many steps, whatever the epochs, where positive."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant, constant_with_warmup, … as transformers names them."""
    lr_scheduler_kwargs: Annotated[dict[str, Any], BeforeValidator(_numbers)] = Field(default_factory=dict)
    """Passed to the schedule."""
    warmup_steps: WarmupSteps = 0.0
    """Steps of warm-up; below 1, a share of all steps."""
    packing: bool = False
    """A step is a token budget (batch size × accumulation × data.max_length), not a number of rows."""
    gradient_checkpointing: bool = False
    """Recomputes every layer's activations in the backward pass: less memory, half as much work again."""
    gradient_checkpointing_layers: NonNegativeInt | Literal["auto"] = "auto"
    """Recomputes the first layers alone, so many or, by `auto`, the fewest that `max_memory_gb` asks for."""
    max_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """What the run should stay below, in 10⁹ bytes; by default what the machine has free."""
    gradient_checkpointing_kwargs: Annotated[
        dict[str, Any], BeforeValidator(lambda value: {} if value is None else value), AfterValidator(_not_reentrant)
    ] = Field(default_factory=dict)
    """`use_reentrant: false` is what is always used."""
    logging_strategy: Strategy = "steps"
    """When a line goes to metrics.jsonl."""
    logging_steps: Annotated[float, Field(gt=0)] = 10
    """Steps between lines; below 1, a share of all steps."""
    logging_first_step: bool = True
    """Also after step 1."""
    logging_dir: FolderName | None = None
    """TensorBoard's folder; `output_dir/tensorboard` by default."""
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = "passive"
    """What train.log and the screen hold; `passive` is info."""
    disable_tqdm: bool = False
    """No progress bar."""
    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], BeforeValidator(_loggers)] = Field(
        default_factory=list
    )
    """Further loggers: tensorboard, wandb, mlflow, trackio. WANDB_…, MLFLOW_… and TRACKIO_… say where they write."""
    run_name: str | None = None
    """What W&B, MLflow and trackio call the run; the output folder's name by default."""
    project: str = "phinetune"
    """The project or experiment that these put it in."""
    eval_strategy: Strategy = "no"
    """When the held-out loss is taken, beside once at the end; `steps` where only `eval_steps` is given."""
    eval_steps: Annotated[float, Field(gt=0)] | None = None
    """Steps between evaluations; `logging_steps` by default; below 1, a share of all steps."""
    eval_on_start: bool = False
    """Also before step 1."""
    save_strategy: Strategy = "epoch"
    """When a checkpoint is written; `steps` where only `save_steps` is given."""
    save_steps: Annotated[float, Field(gt=0)] = 500
    """Steps between checkpoints; below 1, a share of all steps."""
    save_total_limit: PositiveInt | None = 2
    """Newest checkpoints kept, two at least; the best by `metric_for_best_model` beside them."""
    load_best_model_at_end: bool = False
    """The adapter at the end is that of the best evaluation, not the last one."""
    metric_for_best_model: Annotated[str, AfterValidator(_known_metric)] | None = None
    """eval_loss (the default where one is needed) or perplexity: by what the best checkpoint is kept."""
    early_stopping_patience: PositiveInt | None = None
    """Ends when so many evaluations one after the other haven't improved (EarlyStoppingCallback)."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """What counts as an improvement has to be larger."""
    seed: NonNegativeInt = 42
    """Of the LoRA weights, the row order and dropout."""
    data_seed: NonNegativeInt | None = None
    """Of the row order and the held-out share; `seed` by default."""
    use_cpu: bool = False
    """Stays off an accelerator that is there."""

    @property
    def seed_of_rows(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def name(self) -> str:
        return self.run_name or Path(self.output_dir).resolve().name


class PeftConfig(Section):
    """What is trained (names of LoraConfig)."""

    r: PositiveInt = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Share = 0.05
    """Dropout before A."""
    target_modules: str | list[str] = "all-linear"
    """Names or suffixes, a regex, or all-linear. q_proj … up_proj mean their rows of Phi-3's fused layers."""
    exclude_modules: str | list[str] | None = None
    """Names that get no LoRA."""
    use_rslora: bool = False
    """Scales by lora_alpha / √r."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """r by layer name."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """lora_alpha by layer name."""
    use_dora: bool = False
    """Learns the norm of each output's weights apart from their direction."""
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|pissa|pissa_niter_\d+|olora)$")] = True
    """true, gaussian, pissa, pissa_niter_N, olora; false draws B at random too."""
    layers_to_transform: int | list[int] | None = None
    """Only layers of these numbers."""
    layers_pattern: str | list[str] | None = None
    """The name in front of a layer's number."""
    modules_to_save: list[str] | None = None
    """Modules of which a whole copy trains: lm_head, embed_tokens."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: B's learning rate over A's."""
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = 1e-6
    """LoRA+: the learning rate of adapted embeddings."""
    task_type: Annotated[Literal["CAUSAL_LM"], BeforeValidator(lambda value: value or "CAUSAL_LM")] = "CAUSAL_LM"
    """The task."""


_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")


class EvaluationConfig(Section):
    """What is measured on the held-out rows, beside their loss."""

    metrics: list[Annotated[str, AfterValidator(_known_answer_metric)]] = Field(default_factory=list)
    """Of answers, by base and tuned model: exact_match, rouge1, rouge2, rougeL, rougeLsum, bleu, chrf,
    json_valid, json_fields, or FILE.py:NAME, a function of yours."""
    max_new_tokens: PositiveInt = 256
    """Tokens an answer may have."""
    do_sample: bool = False
    """Answers are drawn, by the names of GenerationConfig; greedy ones by default."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 likely tokens get likelier."""
    top_k: NonNegativeInt = 50
    """Only so many of the likeliest tokens are drawn from; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens whose probabilities add up to this."""
    min_p: Share | None = None
    """Only tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that were said or asked before get less likely."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """So many tokens in a row are never said twice."""

    @model_validator(mode="after")
    def _draws_or_not(self) -> "EvaluationConfig":
        fields = type(self).model_fields
        drawn = [name for name in _OF_DRAWING if getattr(self, name) != fields[name].default]
        if drawn and not self.do_sample:
            raise ValueError(f"{drawn[0]} says how answers are drawn: set do_sample: true, too")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        names = ("do_sample", "repetition_penalty", "no_repeat_ngram_size", *(_OF_DRAWING if self.do_sample else ()))
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Recipe(Section):
    """Everything a run is asked to do."""

    model: str
    """Hub id, local folder, .gguf file, or smollm2 (the embedded one)."""
    model_kwargs: ModelKwargs = Field(default_factory=ModelKwargs)
    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to AutoTokenizer.from_pretrained."""
    data: DataConfig
    training_config: TrainingConfig = Field(default_factory=TrainingConfig)
    peft_config: PeftConfig = Field(default_factory=PeftConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> Mapping[str, str]:
        """Where settings that aren't defaults came from, by `section.name`: recipe, command line, derived from …"""
        return self._origins

    @origins.setter
    def origins(self, origins: Mapping[str, str]) -> None:
        self._origins = dict(origins)

    def __eq__(self, other: object) -> bool:
        """By the values, wherever they came from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def derived(self, section: str, name: str, value: Any, source: str) -> "Recipe":
        """The recipe with a setting that was left open decided by what a run has found."""
        own = getattr(self, section).model_copy(update={name: value})
        recipe = self.model_copy(update={section: own})
        recipe.origins = {**self._origins, f"{section}.{name}": f"derived from {source}"}
        return recipe
