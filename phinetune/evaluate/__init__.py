"""How good a model is: held-out loss, and answers compared with what should have come."""

from phinetune.evaluate.compare import Answer, Comparison, compare
from phinetune.evaluate.loss import evaluate_loss
from phinetune.evaluate.metrics import Measured, bootstrap, measure

__all__ = ["Answer", "Comparison", "Measured", "bootstrap", "compare", "evaluate_loss", "measure"]
