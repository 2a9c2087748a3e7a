"""For `trl.SFTTrainer`: the loss as the model computes it.

    from phinetune.trl import ModelLoss
    from trl import SFTTrainer

    class Trainer(ModelLoss, SFTTrainer):
        pass

    Trainer(model=phinetune.accelerate(model), args=SFTConfig(...), ...)

TRL multiplies the hidden states by the head itself.  Off a GPU it does so for padding too, and twice.  Its way to
another loss is a subclass with a `compute_loss` of its own, which this is.
"""

from typing import Any

from transformers import Trainer

from phinetune.model.accelerate import IGNORED, LeanCausalLM


class ModelLoss:
    """Goes before `SFTTrainer` among a trainer's bases; of a model that `phinetune.accelerate` has changed, the loss is
    over the supervised tokens alone.  TRL's `entropy`, `mean_token_accuracy` and `num_tokens` aren't logged then."""

    args: Any
    compute_loss_func: Any
    label_smoother: Any
    aux_loss_enabled: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over supervised tokens; DFT, label smoothing, experts and losses of the caller's are left to TRL."""
        special = self.args.loss_type != "nll" or self.compute_loss_func is not None or self.label_smoother is not None
        if special or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        inputs = {**inputs, "use_cache": False}
        if any(isinstance(module, LeanCausalLM) for module in model.modules()):
            if not return_outputs:
                inputs["skip_logits"] = True  # of held-out rows, too
            if not num_items_in_batch and "labels" in inputs:  # nothing learnt is no loss, as in TRL
                num_items_in_batch = max(1, int((inputs["labels"][:, 1:] != IGNORED).sum()))
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
