"""What a run will take, said before it starts: time and memory from the model's sizes and this machine's rate."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from phinetune import lora
from phinetune.data import Example

# Share of the machine's matrix-product rate that a whole training step reaches, measured on SmolLM2-135M in
# flat batches of 1,024 tokens on 2 CPU cores.
SHARE_OF_RATE = 0.6


def expected_seconds(model: Any, examples: Sequence[Example], tokens: int) -> float:
    """For `tokens` trained tokens: 4 FLOP a weight and token (2 forward, 2 back), over the measured rate.

    The head counts for supervised tokens only.  See Hu et al. for why a frozen weight has no third product.
    """
    head = model.get_output_embeddings()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    share = sum(e.supervised for e in examples) / sum(len(e.ids) for e in examples)
    flop_per_token = 4 * weights + 4 * share * (head.weight.numel() if head is not None else 0)
    return tokens * flop_per_token / (product_rate(model) * SHARE_OF_RATE)


def product_rate(model: Any) -> float:
    """FLOP a second of this machine at one of the model's own products (some 0.2 s)."""
    _, layer = max(lora.lora_layers(model), key=lambda item: item[1].weight.numel())
    x = torch.ones(512, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            begin = time.perf_counter()
            torch.nn.functional.linear(x, layer.weight)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return 2 * x.shape[0] * layer.weight.numel() / min(seconds)


def expected_gb(model: Any, batch_tokens: int) -> float:
    """Peak memory of a step on `batch_tokens` tokens, in units of 10⁹ bytes.

    Weights; LoRA parameters four times in fp32 (value, gradient, two moments); what the layers keep for the
    backward pass, by transformers' eager layers about 34 hidden widths and 8 intermediate ones a token and layer;
    the chunk of logits; and the interpreter with its libraries.
    """
    config = model.config
    base = {id(p): p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad}
    trained = sum(p.numel() * 16 for p in model.parameters() if p.requires_grad)
    element = torch.finfo(model.dtype).bits // 8
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = (34 * config.hidden_size + 8 * intermediate) * element * config.num_hidden_layers * batch_tokens
    return float(sum(base.values()) + trained + kept) / 1e9 + 0.6
