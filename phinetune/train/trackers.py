"""Loggers of others that a run's numbers go to as well, by `report_to`: TensorBoard, W&B, MLflow, trackio.

Each keeps its own habits: where it writes, and to whom it sends, is said by its environment variables, and without one
W&B and MLflow write into the run's folder.  A tracker that fails costs a warning, never the run.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from phinetune.errors import InputError
from phinetune.recipe import Recipe

log = logging.getLogger(__name__)


class Tracker(Protocol):
    def write(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def check_trackers(recipe: Recipe) -> None:
    """Raises InputError for one that isn't installed."""
    for name in recipe.training_config.report_to:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                "training_config.report_to", f"{name} is not installed", f"pip install 'phinetune[{name}]'"
            )


class Trackers:
    """All that a recipe asks for, open."""

    def __init__(self, recipe: Recipe, folder: Path, begun: str, first_step: int) -> None:
        """
        Args:
            begun: when the run began, by which a resumed one is the same to them.
            first_step: behind which this process goes on.
        """
        self._open: dict[str, Tracker] = {}
        for name in recipe.training_config.report_to:
            self._trying(name, partial(self._add, name, recipe, folder, begun, first_step))

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            self._trying(name, partial(tracker.write, metrics, step))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._trying(name, tracker.close)

    def _add(self, name: str, *given: Any) -> None:
        self._open[name] = TRACKERS[name](*given)

    def _trying(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a network, a server, a full disk of theirs
            self._open.pop(name, None)
            log.warning(f"report_to: {name} is left out from here on ({' '.join(str(error).split())})")


class TensorBoard:
    """Event files in `logging_dir`."""

    def __init__(self, recipe: Recipe, folder: Path, begun: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        where = recipe.training_config.logging_dir or str(folder / "tensorboard")
        self._writer = SummaryWriter(where, purge_step=first_step + 1)

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run in `WANDB_PROJECT`, or in `project`; with WANDB_MODE=offline it is only written to `output_dir/wandb`."""

    def __init__(self, recipe: Recipe, folder: Path, begun: str, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or recipe.training_config.project,
            name=recipe.training_config.name,
            id=identity(folder, begun),
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or folder,
            config=settings(recipe),
            settings=wandb.Settings(console="off"),
        )

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run in the experiment `MLFLOW_EXPERIMENT_NAME`, or `project`; in `output_dir/mlruns` without
    MLFLOW_TRACKING_URI."""

    def __init__(self, recipe: Recipe, folder: Path, begun: str, first_step: int) -> None:
        # Its newer versions ask for a data base in the place of files, unless told so.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
        self._client, tag = MlflowClient(where), "phinetune.run"
        name, id = os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe.training_config.project, identity(folder, begun)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        before = self._client.search_runs([experiment], f"tags.`{tag}` = '{id}'")  # of an earlier life
        run = (
            before[0]
            if before
            else self._client.create_run(experiment, run_name=recipe.training_config.name, tags={tag: id})
        )
        self._id = run.info.run_id
        if not before:
            for path, value in settings(recipe).items():
                self._client.log_param(self._id, path, str(value)[:500])

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run in `project`, in trackio's own folder (TRACKIO_DIR), which its dashboard reads."""

    def __init__(self, recipe: Recipe, folder: Path, begun: str, first_step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=recipe.training_config.project,
            name=f"{recipe.training_config.name}-{identity(folder, begun)}",
            resume="allow",
            config=settings(recipe),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Recipe, Path, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def identity(folder: Path, begun: str) -> str:
    """The same for a run and its resumptions, and of no other run."""
    return hashlib.sha256(f"{folder.resolve()} {begun}".encode()).hexdigest()[:12]


def settings(recipe: Recipe) -> dict[str, Any]:
    """{section.name: value}, without the token."""
    tree = recipe.model_dump(mode="json", exclude={"model_kwargs": {"token"}})
    return {
        path: value
        for section, own in tree.items()
        for path, value in (
            [(f"{section}.{name}", one) for name, one in own.items()] if isinstance(own, dict) else [(section, own)]
        )
    }
