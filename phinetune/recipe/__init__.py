"""What a run is asked to do: typed settings, the names they may have, where they are read from."""

from phinetune.recipe.load import apply_override, dump_recipe, load_recipe, make_model_kwargs, make_recipe, make_section
from phinetune.recipe.schema import (
    ANSWER_METRICS,
    FROM_PYTHON,
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
    "FROM_PYTHON",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "ModelKwargs",
    "PeftConfig",
    "Recipe",
    "TrainingConfig",
    "apply_override",
    "dump_recipe",
    "load_recipe",
    "make_model_kwargs",
    "make_recipe",
    "make_section",
]
