"""How far a run is: what its checkpoints keep beside weights and moments."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from phinetune.errors import CheckpointError
from phinetune.recipe import TrainingConfig
from phinetune.train.best import Best
from phinetune.train.checkpoint import read_state
from phinetune.train.usage import NOTHING


@dataclass
class Counters:
    """What a run has done; the `since_` fields belong to the next line of metrics.jsonl."""

    tokens: int = 0
    supervised_tokens: int = 0
    digest: str = ""  # of all tokens, in the order in which they were trained on
    losses: list[float] = field(default_factory=list)  # of the last steps, by which jumps are seen
    since_steps: int = 0
    since_loss: float = 0.0  # Σ loss · supervised tokens
    since_tokens: int = 0
    since_supervised: int = 0
    since_seconds: float = 0.0
    since_grad_norm: float = 0.0  # Σ


class Progress(NamedTuple):
    """What a checkpoint says of its run."""

    checkpoint: Path
    step: int
    counters: Counters
    best: Best
    held_out: str
    """A digest of the rows that `best` was evaluated on."""
    max_batch_tokens: int
    memory_was_refused: bool
    """So that flat batches are smaller than the recipe says."""
    usage: dict[str, float]
    identity: dict[str, Any]
    """All that an update depends on."""

    @classmethod
    def of(cls, checkpoint: Path, config: TrainingConfig) -> "Progress":
        """By a checkpoint that is whole.

        Raises:
            CheckpointError: if it says nothing that a run could go on with.
        """
        state = read_state(checkpoint)
        try:
            return cls(
                checkpoint=checkpoint,
                step=int(state["step"]),
                counters=Counters(**state["counters"]),
                best=Best.of(config, **state["best"]),
                held_out=str(state["held_out"]),
                max_batch_tokens=int(state["max_batch_tokens"]),
                memory_was_refused=bool(state["memory_was_refused"]),
                usage={name: float(state["usage"].get(name, none)) for name, none in NOTHING.items()},
                identity=dict(state["identity"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"its state.json can't be used ({type(error).__name__}: {error})"
            raise CheckpointError(str(checkpoint), what, "give another checkpoint") from None

    def state(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        own = self._asdict()
        del own["checkpoint"], own["step"]
        return {**own, "counters": asdict(self.counters), "best": self.best.state()}
