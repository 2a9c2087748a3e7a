"""How good a model is: held-out loss, and answers compared with what should have come."""

from phinetune.evaluate.compare import Answer, Comparison, compare
from phinetune.evaluate.held_out import check_held_out, dequantised_is_better, held_out
from phinetune.evaluate.loss import RowLosses, evaluate_loss, evaluate_rows
from phinetune.evaluate.metrics import Measured, bootstrap, check_metrics, measure, measure_loss

__all__ = [
    "Answer",
    "Comparison",
    "Measured",
    "RowLosses",
    "bootstrap",
    "check_held_out",
    "check_metrics",
    "compare",
    "dequantised_is_better",
    "evaluate_loss",
    "evaluate_rows",
    "held_out",
    "measure",
    "measure_loss",
]
