"""A digest of how conversations become tokens: an adapter is good for the template and tokenizer it was tuned with.

It covers what decides ids: the chat template's source, and the tokenizer's vocabulary, merges, added tokens,
normalizer and pre-tokenizer.  Where files lie and what versions wrote them doesn't enter.
"""

import hashlib
import json
from typing import Any

from phinetune.data.encode import tokenizer_json
from phinetune.data.template import template_sources

DECIDING = ("normalizer", "pre_tokenizer", "model")
ADDED = ("id", "content", "special", "lstrip", "rstrip", "single_word", "normalized")


def chat_fingerprint(tokenizer: Any) -> dict[str, str]:
    """{"template": sha256, "tokenizer": sha256}"""
    tree = json.loads(tokenizer_json(tokenizer))
    deciding = {name: tree[name] for name in DECIDING}
    deciding["added_tokens"] = [[token[name] for name in ADDED] for token in tree["added_tokens"]]
    sources = [source.replace("\r\n", "\n") for source in template_sources(tokenizer)]
    return {"template": _digest(sources), "tokenizer": _digest(deciding)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
