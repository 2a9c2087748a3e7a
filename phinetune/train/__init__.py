"""The loop, optimiser, checkpoints and logging of a run."""

from phinetune.train.finetune import Result, train
from phinetune.train.loop import Loop, training_step

__all__ = ["Loop", "Result", "train", "training_step"]
