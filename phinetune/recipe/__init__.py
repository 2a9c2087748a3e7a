"""What a run is asked to do: typed settings, the names they may have, where they are read from."""

from phinetune.recipe.load import dump_recipe, load_recipe, make_recipe
from phinetune.recipe.schema import (
    ANSWER_METRICS,
    DataConfig,
    DataSource,
    EvaluationConfig,
    ModelKwargs,
    PeftConfig,
    Recipe,
    TrainingConfig,
)

__all__ = [
    "ANSWER_METRICS",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "ModelKwargs",
    "PeftConfig",
    "Recipe",
    "TrainingConfig",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
]
