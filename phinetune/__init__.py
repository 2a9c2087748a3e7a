"""Fine-tune Phi-3 and its relatives with LoRA, on the machine you have.

    import phinetune

    result = phinetune.finetune(
        model="smollm2",
        train="chats.jsonl",
        training_config={"output_dir": "runs/mine", "num_train_epochs": 3},
        peft_config={"r": 16, "lora_alpha": 32},
    )

The LoRA layers alone: `import phinetune.lora as lora`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "finetune"]

if TYPE_CHECKING:
    from phinetune.api import finetune


def __getattr__(name: str) -> Any:
    if name == "finetune":  # heavy imports wait until they are needed
        from phinetune.api import finetune

        return finetune
    raise AttributeError(f"module 'phinetune' has no attribute {name!r}")
