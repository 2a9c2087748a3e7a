"""How good a model is: held-out loss, answers against expected ones, base against tuned."""

from phinetune.evaluate.compare import Answer, Comparison, compare, exact_match
from phinetune.evaluate.loss import evaluate_loss

__all__ = ["Answer", "Comparison", "compare", "evaluate_loss", "exact_match"]
