"""Which step evaluated best, and when to stop because none gets better: HF's `metric_for_best_model` and
`EarlyStoppingCallback`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phinetune.recipe import TrainingConfig


@dataclass
class Best:
    """The state is in checkpoints, so that a resumed run stops where the whole one would."""

    metric: str
    patience: int | None
    threshold: float
    keeps: bool  # a checkpoint of the best step
    evaluated_behind: int | None = None  # the step of the last evaluation
    step: int | None = None  # the best one
    value: float | None = None
    without_gain: int = 0  # evaluations

    @classmethod
    def of(cls, config: TrainingConfig, **state: Any) -> "Best":
        keeps = config.load_best_model_at_end or config.metric_for_best_model is not None
        metric = (config.metric_for_best_model or "eval_loss").removeprefix("eval_")
        return cls(
            metric="eval_loss" if metric == "loss" else metric,
            patience=config.early_stopping_patience,
            threshold=config.early_stopping_threshold,
            keeps=keeps,
            **state,
        )

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("evaluated_behind", "step", "value", "without_gain")}

    def see(self, step: int, measured: Mapping[str, float]) -> None:
        """An evaluation behind a step; one before the first step is no candidate."""
        self.evaluated_behind = step
        value = measured[self.metric]
        if step == 0:
            return
        gain = math.inf if self.value is None else self.value - value  # of both metrics the smaller is better
        self.without_gain = 0 if gain > self.threshold else self.without_gain + 1
        if gain > 0:
            self.step, self.value = step, value

    def is_wanted(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be kept for what it evaluated to."""
        return self.keeps and self.step == step

    @property
    def decides(self) -> bool:
        """Whether anything goes by it: which adapter stays, or when the run ends."""
        return self.keeps or self.patience is not None

    @property
    def is_exhausted(self) -> bool:
        return self.patience is not None and self.without_gain >= self.patience

    @property
    def words(self) -> str:
        return f"best {self.metric} {self.value:.4f} behind step {self.step}"
