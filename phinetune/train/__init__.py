"""A run: its loop, optimiser, checkpoints and logging; what it will need, and proof that it can be resumed."""

from phinetune.train.finetune import Result, train
from phinetune.train.loop import Loop, training_step

__all__ = ["Loop", "Result", "train", "training_step"]
