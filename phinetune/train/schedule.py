"""When a run logs, evaluates and saves: `logging_strategy`, `eval_strategy`, `save_strategy` as steps."""

from dataclasses import dataclass

from phinetune.data import Plan
from phinetune.recipe import TrainingConfig
from phinetune.train.best import Best
from phinetune.train.optimiser import interval


@dataclass(frozen=True)
class Schedule:
    """Steps, counted from 1, behind which a run does each."""

    log: frozenset[int]
    evaluate: frozenset[int]
    save: frozenset[int]

    @classmethod
    def of(cls, config: TrainingConfig, steps: Plan) -> "Schedule":
        last = frozenset({len(steps)})
        log = _due(config.logging_strategy, config.logging_steps, steps)
        save = _due(config.save_strategy, config.save_steps, steps)
        logs_first = frozenset({1}) if config.logging_first_step else frozenset()
        return cls(
            log=frozenset() if config.logging_strategy == "no" else log | last | logs_first,
            evaluate=_due(config.eval_strategy, config.eval_steps or config.logging_steps, steps),
            save=frozenset() if config.save_strategy == "no" else save | last,
        )

    def saves_behind(self, step: int, best: Best) -> int:
        """How many checkpoints may be written behind that step: each evaluation can be the best so far, and the last
        where a run stops early."""
        wanted = self.save | self.evaluate if best.keeps else self.save
        return sum(due > step for due in wanted) + (bool(self.save) and best.patience is not None)


def _due(strategy: str, every: float, steps: Plan) -> frozenset[int]:
    if strategy == "steps":
        each = interval(every, len(steps))
        return frozenset(range(each, len(steps) + 1, each))
    return frozenset(steps.epoch_ends) if strategy == "epoch" else frozenset()
