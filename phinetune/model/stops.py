"""Where an answer ends."""

from typing import Any

from phinetune.data import Renderer


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends a turn: the tokenizer's end of text, what the model's generation config names, and the
    control tokens that the chat template writes behind words (Phi-3: <|end|>, <|assistant|>)."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids |= {tokenizer.eos_token_id, *Renderer.of(tokenizer).turn_ids()}
    return sorted(i for i in ids if i is not None)
