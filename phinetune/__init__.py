"""Fine-tune Phi-3 and its relatives with LoRA, on the machine you have.

    import phinetune

    result = phinetune.finetune(
        model="smollm2",
        train="chats.jsonl",
        training_config={"output_dir": "runs/mine", "num_train_epochs": 3},
        peft_config={"r": 16, "lora_alpha": 32},
    )
    model, tokenizer = phinetune.load(result.folder)  # for transformers' generate and pipeline
    phinetune.merge(result.folder)  # a plain model

For other trainers, `model = phinetune.accelerate(model)`.  The LoRA layers alone: `import phinetune.lora as lora`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "accelerate", "finetune", "load", "merge", "model_card", "push"]

if TYPE_CHECKING:
    from phinetune.api import finetune, load, merge, push
    from phinetune.model.accelerate import accelerate
    from phinetune.report import model_card


_HOMES = {
    "accelerate": "phinetune.model.accelerate",
    "model_card": "phinetune.report",
    **dict.fromkeys(("finetune", "load", "merge", "push"), "phinetune.api"),
}


def __getattr__(name: str) -> Any:  # heavy imports wait until they are needed
    if name not in _HOMES:
        raise AttributeError(f"module 'phinetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
