"""Names, values and files of recipes."""

import dataclasses
from pathlib import Path

import peft
import pytest
from conftest import ROOT
from transformers import BitsAndBytesConfig, TrainingArguments

from phinetune.errors import RecipeError
from phinetune.recipe import ModelKwargs, dump_recipe, load_recipe, make_model_kwargs, make_recipe
from phinetune.recipe.names import SECTIONS, known_names
from phinetune.train.optimiser import warmup_steps

MINIMAL = {"model": "smollm2", "data": {"train": "chats.jsonl"}}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_read_without_a_word(path):
    recipe, words = load_recipe(path)
    assert words == []
    again, _ = make_recipe(__import__("yaml").safe_load(dump_recipe(recipe)))
    assert again == recipe


def test_every_name_of_the_installed_training_arguments_and_lora_config_is_known():
    import peft
    import transformers

    def names(config_class):
        return {field.name for field in dataclasses.fields(config_class) if field.init}

    assert names(transformers.TrainingArguments) - set(known_names("training_config")) == set()
    assert names(peft.LoraConfig) - set(known_names("peft_config")) == set()


@pytest.mark.parametrize(
    ("section", "old", "value", "path", "read_as"),
    [
        ("training_config", "evaluation_strategy", "steps", "training_config.eval_strategy", "steps"),
        ("training_config", "warmup_ratio", 0.2, "training_config.warmup_steps", 0.2),
        ("training_config", "max_seq_length", 512, "data.max_length", 512),
        ("training_config", "no_cuda", True, "training_config.use_cpu", True),
        ("training_config", "activation_checkpointing", True, "training_config.gradient_checkpointing", True),
        ("training_config", "dataset_num_proc", 2, "data.num_proc", 2),
        ("model_kwargs", "torch_dtype", "torch.bfloat16", "model_kwargs.dtype", "bfloat16"),
        ("peft_config", "lora_r", 4, "peft_config.r", 4),
    ],
)
def test_an_old_name_is_honoured_with_a_word(section, old, value, path, read_as):
    recipe, words = make_recipe({**MINIMAL, section: {**MINIMAL.get(section, {}), old: value}})
    owner, name = path.split(".")
    assert getattr(getattr(recipe, owner), name) == read_as
    assert len(words) == 1
    assert old in words[0]
    assert path in words[0]


@pytest.mark.parametrize("what", ["save", "eval"])
def test_steps_without_a_strategy_are_steps(what):
    """The model card's dictionary has save_steps alone; elsewhere save_strategy is steps unless one says otherwise."""
    recipe, words = make_recipe({**MINIMAL, "training_config": {f"{what}_steps": 100}})
    assert getattr(recipe.training_config, f"{what}_strategy") == "steps"
    assert words == [f"training_config.{what}_strategy is steps, since {what}_steps is given"]
    assert recipe.origins[f"training_config.{what}_strategy"] == f"derived from {what}_steps"
    given = {f"{what}_steps": 100, f"{what}_strategy": "epoch"}
    assert make_recipe({**MINIMAL, "training_config": given})[1] == []


def test_a_name_without_counterpart_is_said_aloud():
    given = {
        "training_config": {"group_by_length": True, "push_to_hub": True, "report_to": "all"},
        "model_kwargs": {"trust_remote_code": True},
    }
    _, words = make_recipe({**MINIMAL, **given})
    assert len(words) == 4
    assert all("is ignored" in word for word in words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"training_config": {"learning_rat": 1}},
            "unknown name training_config.learning_rat .did you mean learning_rate",
        ),
        ({"peft_config": {"lora_alfa": 1}}, "did you mean lora_alpha"),
        ({"peft_config": {"lora_bias": True}}, "lora_bias=True is not supported yet"),
        ({"training_config": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1 is not supported"),
        ({"training_config": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha=5 is not supported"),
        ({"training_config": {"loss_type": "dft"}}, "loss_type='dft' is not supported: the loss is plain"),
        ({"training_config": {"greater_is_better": True}}, "of eval_loss and perplexity the smaller is better"),
        ({"training_config": {"train_sampling_strategy": "sequential"}}, "rows are shuffled"),
        ({"training_config": {"dataloader_drop_last": True}}, "takes the rows that are left"),
        ({"peft_config": {"ensure_weight_tying": True}}, "is not supported yet"),
        ({"learning_rate": 1}, "learning_rate belongs in training_config"),
        ({"training_config": {"learning_rate": -1}}, "training_config.learning_rate=-1"),
        (
            {"training_config": {"learning_rate": "fast", "seed": "x"}},
            "learning_rate='fast'.* and training_config.seed='x'",
        ),
        ({"training_config": {"lr": 1e-3, "learning_rate": 1e-4}}, "learning_rate is given twice, as 0.001 and as"),
        ({"training_config": {"max_seq_length": 512}, "data": {"train": "a", "max_length": 99}}, "given twice"),
        ({1: 2}, "unknown section 1"),
        ({"training_config": []}, "is .., not a mapping"),
        ({"data": {}}, "data.train is missing"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe({**MINIMAL, **given})


def test_harmless_values_of_unsupported_names_pass():
    make_recipe({**MINIMAL, "peft_config": {"use_dora": False, "init_lora_weights": True, "modules_to_save": None}})
    same = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "loss_type": "nll", "report_to": "none"}
    same |= {"completion_only_loss": None, "lr_scheduler_kwargs": None, "gradient_checkpointing_kwargs": None}
    recipe, words = make_recipe({**MINIMAL, "training_config": same})
    assert words == []
    assert recipe.data.supervise == "assistant"


@pytest.mark.parametrize(
    ("assistant", "completion", "supervise"),
    [
        (True, None, "assistant"), (False, None, "completion"), (None, True, "completion"), (None, False, "all"),
        (True, True, "assistant"), (False, True, "completion"), (False, False, "all"), (None, None, "assistant"),
        (True, False, "assistant"),
    ],
)  # fmt: skip
def test_trls_flags_for_what_is_learnt(assistant, completion, supervise):
    flags = {"assistant_only_loss": assistant, "completion_only_loss": completion}
    for given in (flags, {name: value for name, value in flags.items() if value is not None}):
        recipe, _ = make_recipe({**MINIMAL, "training_config": given})
        assert recipe.data.supervise == supervise


def test_a_number_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: a\ndata: {train: a}\ntraining_config: {lr_scheduler_kwargs: {min_lr: 1e-5, decay_type: cosine}}\n"
    )
    assert load_recipe(path)[0].training_config.lr_scheduler_kwargs == {"min_lr": 1e-5, "decay_type": "cosine"}


def test_an_override_is_stronger_than_a_quantization_config(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\ndata: {train: a}\nmodel_kwargs: {quantization_config: {load_in_4bit: true}}\n")
    assert load_recipe(path)[0].model_kwargs.load_in_4bit
    assert not load_recipe(path, ["load_in_4bit=false"])[0].model_kwargs.load_in_4bit


def test_the_samples_own_values_pass():
    import torch

    recipe, _ = make_recipe({**MINIMAL, "model_kwargs": {"torch_dtype": torch.bfloat16, "use_cache": False}})
    assert recipe.model_kwargs.dtype == "bfloat16"


def test_yaml_merge_keys_and_an_empty_section(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: smollm2\ndata: &d {train: a}\npeft_config:\nevaluation: {<<: {max_new_tokens: 3}}\n")
    recipe, _ = load_recipe(path, ["r=8"])
    assert recipe.peft_config.r == 8
    assert recipe.evaluation.max_new_tokens == 3


def test_a_date_is_text_and_is_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    words = "model: smollm2\ndata: {train: a, today: 2026-01-31, chat_template_kwargs: {date_string: 2026-01-30}}\n"
    path.write_text(words)
    assert load_recipe(path)[0].data.today == "2026-01-31"
    assert load_recipe(path)[0].data.chat_template_kwargs == {"date_string": "2026-01-30"}
    assert load_recipe(path, ["data.today=2026-02-01"])[0].data.today == "2026-02-01"
    with pytest.raises(RecipeError, match=r"data\.today='31\.1\.2026'"):
        load_recipe(path, ["data.today=31.1.2026"])


@dataclasses.dataclass
class LikeSFTConfig:
    """Which a machine without bf16 doesn't make without being told."""

    max_length: int | None = 1024
    bf16: bool | None = None
    learning_rate: float = 2e-5
    seed: int = dataclasses.field(default_factory=lambda: 42)

    def __post_init__(self):
        if self.bf16 is None:
            raise ValueError("your setup doesn't support bf16")


def test_an_object_of_a_class_that_this_machine_makes_no_plain_one_of():
    recipe, words = make_recipe({**MINIMAL, "training_config": LikeSFTConfig(bf16=False)})
    assert recipe.data.max_length == 1024, "its own, though that is its default"
    given = {**MINIMAL, "data": {"train": "a", "max_length": 99}, "training_config": LikeSFTConfig(bf16=False)}
    assert make_recipe(given)[0].data.max_length == 99, "an object always has one"
    assert recipe.training_config.learning_rate == 2e-5
    assert [word for word in words if "max_length" in word]


@pytest.mark.trl
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_what_trls_own_object_asks_for(tmp_path):
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=None, completion_only_loss=True)
    recipe, words = make_recipe({**MINIMAL, "training_config": config})
    assert (recipe.data.max_length, recipe.data.supervise) == (1 << 20, "completion")
    assert recipe.training_config.gradient_checkpointing, "TRL's default"
    assert recipe.training_config.learning_rate == 2e-5
    assert sorted(word.split()[0] for word in words) == [
        "training_config.completion_only_loss", "training_config.max_length"
    ], "and nothing that a machine without bf16 fills in"  # fmt: skip


def test_real_config_objects_are_taken_whole(tmp_path):
    import peft
    import transformers

    recipe, words = make_recipe(
        {
            **MINIMAL,
            "training_config": transformers.TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4),
            "peft_config": peft.LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "v_proj"]),
        }
    )
    assert recipe.training_config.learning_rate == 3e-4
    assert recipe.training_config.per_device_train_batch_size == 8, "the object's own default, not ours"
    assert recipe.peft_config.r == 4
    assert recipe.peft_config.lora_alpha == 9
    assert recipe.peft_config.lora_dropout == 0
    assert recipe.peft_config.target_modules == ["q_proj", "v_proj"]
    assert words == []
    assert recipe.training_config.save_total_limit is None, "the object's own default: keep all"
    by_perplexity = transformers.TrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="perplexity", load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=500,
    )  # fmt: skip
    assert by_perplexity.greater_is_better, "which transformers fills in by the name"
    recipe, _ = make_recipe({**MINIMAL, "training_config": by_perplexity})
    assert recipe.training_config.metric_for_best_model == "perplexity"


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("learning_rate=1e-4", "training_config", "learning_rate", 1e-4),
        ("training_config.seed=7", "training_config", "seed", 7),
        ("peft_config.target_modules=[q_proj, v_proj]", "peft_config", "target_modules", ["q_proj", "v_proj"]),
        ("eval=0.1", "data", "eval", 0.1),
        ("evaluation_strategy=epoch", "training_config", "eval_strategy", "epoch"),
        ("lr=1e-3", "training_config", "learning_rate", 1e-3),  # demo.yaml has learning_rate
        ("training_config.max_seq_length=99", "data", "max_length", 99),  # and max_length
        ("peft_config.rank=3", "peft_config", "r", 3),
        ("eval_strategy=no", "training_config", "eval_strategy", "no"),  # which YAML reads as false
        ("report_to=none", "training_config", "report_to", []),
    ],
)
def test_overrides(override, section, name, value):
    recipe, _ = load_recipe(ROOT / "recipes" / "demo.yaml", [override])
    assert getattr(getattr(recipe, section), name) == value


@pytest.mark.parametrize("override", ["learning_rate", "nothing=1", "trainingconfig.seed=1"])
def test_bad_overrides(override):
    with pytest.raises(RecipeError, match="override"):
        load_recipe(ROOT / "recipes" / "demo.yaml", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "'model' stands twice, again in line 2"),
        ("model: [", "not valid YAML"),
        ("- a\n", "not a mapping"),
        ("", "not a mapping"),
    ],
)
def test_bad_files(tmp_path: Path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_every_setting_has_a_docstring():
    import ast
    import inspect

    from phinetune.recipe import schema

    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef) and any(node.name == model.__name__ for model in SECTIONS.values()):
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert said, f"{node.name}.{ast.unparse(statement.target)}"


# The shapes of the models that the shipped recipes name, from their configurations on the Hub.
MINI = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
SHAPES = {
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", {**MINI, "num_attention_heads": 32}),
    "microsoft/Phi-3-mini-128k-instruct": ("phi3", {**MINI, "num_attention_heads": 32}),
    "microsoft/Phi-3.5-mini-instruct": ("phi3", {**MINI, "num_attention_heads": 32}),
    "microsoft/Phi-3-medium-4k-instruct": (
        "phi3",
        {"vocab_size": 32064, "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40}
        | {"num_attention_heads": 40, "num_key_value_heads": 10},
    ),
    "microsoft/Phi-4-mini-instruct": (
        "phi3",
        MINI | {"vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "smollm2": (
        "llama",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*_*.yaml")), ids=lambda path: path.name)
def test_the_memory_that_a_shipped_recipe_names_is_that_of_its_model(path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, _ = load_recipe(path)
    family, shape = SHAPES[recipe.model]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{"pad_token_id": 0, **shape}))
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    # Half a byte a number; a byte for the scale of 64 of them, and four for that of 256 scales.
    four_bit = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) - 2 * linear if recipe.model_kwargs.load_in_4bit else 0
    said = float(path.read_text().partition("# Weights: ")[2].split()[0])
    assert said == pytest.approx((2 * model.num_parameters() + four_bit) / 1e9, abs=0.006)
    assert f"recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"per_device_train_batch_size": 8, "per_gpu_train_batch_size": None}, "per_device_train_batch_size", 8),
        ({"warmup_steps": 100, "warmup_ratio": 0.0}, "warmup_steps", 100),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, "warmup_steps", 0.1),
        ({"warmup_steps": 0, "warmup_ratio": 0.0}, "warmup_steps", 0),
        ({"warmup_ratio": 0.0}, "warmup_steps", 0),
        ({"optim": "adamw_torch_fused", "adafactor": False}, "optim", "adamw_torch_fused"),
        ({"use_cpu": True, "no_cuda": False}, "use_cpu", True),
        ({"use_cpu": False, "no_cuda": True}, "use_cpu", True),
        ({"eval_steps": None}, "eval_strategy", "no"),
    ],
)
def test_an_old_name_that_asks_for_nothing_gives_way(given, name, value):
    recipe, _ = make_recipe({**MINIMAL, "training_config": given})
    assert getattr(recipe.training_config, name) == value


def test_two_names_that_ask_for_two_things():
    with pytest.raises(RecipeError, match="warmup_steps is given twice"):
        make_recipe({**MINIMAL, "training_config": {"warmup_steps": 10, "warmup_ratio": 0.1}})


def test_warming_up_all_the_way():
    recipe, _ = make_recipe({**MINIMAL, "training_config": {"warmup_ratio": 1.0}})
    assert warmup_steps(recipe.training_config, 50) == 50
    recipe, _ = make_recipe({**MINIMAL, "training_config": {"warmup_steps": 1}})
    assert warmup_steps(recipe.training_config, 50) == 1


@pytest.mark.parametrize(
    ("section", "config", "kind"),
    [
        ("peft_config", peft.VeraConfig(r=64, target_modules="all-linear"), "VeraConfig"),
        ("peft_config", peft.LoHaConfig(r=8), "LoHaConfig"),
        ("peft_config", TrainingArguments(output_dir="a", use_cpu=True), "TrainingArguments"),
        ("training_config", peft.LoraConfig(), "LoraConfig"),
    ],
)
def test_an_object_of_another_kind(section, config, kind):
    with pytest.raises(RecipeError, match=f"is a {kind}, which asks for another training; give a"):
        make_recipe({**MINIMAL, section: config})


def test_an_adapter_of_another_kind():
    with pytest.raises(RecipeError, match="peft_type='LOHA' is not supported"):
        make_recipe({**MINIMAL, "peft_config": {"peft_type": "LOHA", "r": 8}})
    with pytest.raises(RecipeError, match=r"peft_type=.*ADALORA"):
        make_recipe({**MINIMAL, "peft_config": peft.AdaLoraConfig(r=8, total_step=10)})


def test_a_lora_config_as_a_dictionary():
    recipe, _ = make_recipe({**MINIMAL, "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict()})
    assert (recipe.peft_config.r, recipe.peft_config.target_modules) == (4, ["q_proj"])


def test_what_quantises_is_one_thing():
    as_transformers = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    for over in (ModelKwargs(), ModelKwargs(**ModelKwargs().model_dump()), ModelKwargs(load_in_8bit=True)):
        kwargs = make_model_kwargs({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, over)
        assert (kwargs.load_in_4bit, kwargs.load_in_8bit) == (True, False)
        assert as_transformers.items() <= kwargs.model_dump().items()
    recipe, _ = make_recipe({**MINIMAL, "model_kwargs": {"quantization_config": {"load_in_4bit": True}}})
    assert as_transformers.items() <= recipe.model_kwargs.model_dump().items()
    assert recipe.model_kwargs.bnb_4bit_compute_dtype == "float32"


def test_an_override_by_quantization_config_is_stronger(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\ndata: {train: a}\nmodel_kwargs: {load_in_4bit: false, load_in_8bit: true}\n")
    recipe, _ = load_recipe(path, ["model_kwargs.quantization_config={load_in_4bit: true}"])
    assert (recipe.model_kwargs.load_in_4bit, recipe.model_kwargs.load_in_8bit) == (True, False)


def test_no_limit_to_a_rows_length():
    @dataclasses.dataclass
    class SFTConfig(TrainingArguments):
        max_length: int | None = 1024

    for length, expected in ((None, 1 << 20), (512, 512), (1024, 1024)):
        config = SFTConfig(output_dir="a", use_cpu=True, max_length=length)
        assert make_recipe({**MINIMAL, "training_config": config})[0].data.max_length == expected
