"""Real tokenizers and small random models, shared by all rooms' tests."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data, absent on most machines

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the Hub


LONGEST = ("test_scoreboard", "test_doctor")  # files that take minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of two processes none is left with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    from phinetune.model import load_tokenizer
    from phinetune.recipe import ModelKwargs

    return load_tokenizer("smollm2", ModelKwargs())


@pytest.fixture(scope="session")
def phi3_tokenizer() -> Any:
    from transformers import AutoTokenizer

    if not (SHARED_DATA / "phi3-mini").is_dir():
        pytest.skip("the real Phi-3-mini tokenizer is not here")
    return AutoTokenizer.from_pretrained(SHARED_DATA / "phi3-mini")


@pytest.fixture(scope="session")
def alpaca_chats() -> list[dict[str, Any]]:
    """Real instruction rows as chats."""
    path = SHARED_DATA / "alpaca_en_demo.json"
    if not path.is_file():
        pytest.skip("alpaca_en_demo.json is not here")
    return [
        {
            "messages": [
                {"role": "user", "content": "\n".join(part for part in (row["instruction"], row["input"]) if part)},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in json.loads(path.read_text(encoding="utf-8"))
        if row["output"].strip()
    ]


def tiny_config(family: str, vocab_size: int = 49152, **changes: Any) -> Any:
    """A two-layer model of a family: 4 heads of 16 over 2 key-value heads."""
    import transformers

    classes = {
        "llama": "LlamaConfig",
        "phi3": "Phi3Config",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
    }
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return getattr(transformers, classes[family])(**{**settings, **changes})


def tiny_model(family: str, attn_implementation: str = "phinetune", **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from phinetune.layers import attention

    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), attn_implementation=attn_implementation, dtype=torch.float32
    )
    # transformers' small initial weights make attention nearly uniform; larger ones make a mix-up visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 if "embed" in name else 0.15)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: Any) -> Path:
    """A small random Llama with SmolLM2's tokenizer, as a folder that the command line can load."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama", "sdpa", tie_word_embeddings=True).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """40 short chats in a file."""
    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You add numbers."},
                {"role": "user", "content": f"What is {i} plus {i * 3 % 17}?"},
                {"role": "assistant", "content": f"{i} plus {i * 3 % 17} is {i + i * 3 % 17}." + " Indeed." * (i % 5)},
            ]
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch computes in as many threads as the test's parameter says: `make test` runs everything else in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What a caller may have set torch's default to."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's, which listens at the root, where a run's lines don't come."""
    logger, propagate = logging.getLogger("phinetune"), logging.getLogger("phinetune").propagate
    logger.addHandler(caplog.handler)
    logger.propagate = False
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = propagate


def draw_lora_B(model: Any, seed: int = 1, std: float = 0.02) -> None:
    """At B = 0 the gradient of A vanishes and most mistakes with it."""
    from phinetune.lora import lora_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * std)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert reference.norm() > 0
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
