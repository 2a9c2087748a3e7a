"""Is what is timed the same training?  PEFT on transformers' own model as the oracle, in our environment.

`what: gate`     fp32, every lora_B drawn: our loss and each adapter gradient against PEFT's, and behind AdamW steps
`what: bfloat16` how far bfloat16 takes the loss of each token from PEFT's in fp32, by ours and by PEFT
`what: overlay`  the losses of a bfloat16 run, ours or PEFT's, from adapter weights that a seed decides
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import job_io
import peft
import torch
from child_ours import Trainee, examples_of, steps_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from phinetune.model import flat_batches, row_losses
from phinetune.train.loop import training_step
from phinetune.train.optimiser import trainable_parameters

Rows = Sequence[list[int]]


class Gradients(torch.optim.Optimizer):
    """An optimiser that updates nothing and keeps the gradients of its last step: `training_step` shows none."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__(parameters.values(), {"lr": 0.0})
        self.parameters, self.found = parameters, {}  # type: dict[str, Tensor], dict[str, Tensor]

    def step(self, closure: Any = None) -> None:
        self.found = {name: parameter.grad.clone() for name, parameter in self.parameters.items()}


def draw_adapter(parameters: dict[str, Tensor], seed: int, std_of_B: float) -> None:
    """A as PEFT draws it, B from N(0, std²), each from its name and the seed: any model of these names gets the same.

    At B = 0 the gradient of A vanishes, and most mistakes with it.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            if name.endswith("lora_A"):  # kaiming_uniform with a = √5
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            else:
                drawn = torch.randn(parameter.shape, generator=generator) * std_of_B
            parameter.copy_(drawn)


def round_once(model: torch.nn.Module) -> None:
    """Hands PEFT's layers their base's output in fp32, so that its sum with the update is rounded once.

    As they are, the base's output is rounded to bfloat16 before the update is added, and the sum again: an update of
    less than half a unit in the last place is gone, every time.
    """
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            base = module.base_layer

            def in_fp32(x: Tensor, base: Any = base) -> Tensor:
                with torch.autocast("cpu", enabled=False):
                    return torch.nn.functional.linear(x.float(), base.weight.float())

            base.forward = in_fp32
            module.register_forward_hook(lambda module, given, out: out.to(torch.bfloat16))


class Peft:
    """The oracle: transformers' model, PEFT's layers, a padded batch, whole logits, cross-entropy in fp32."""

    def __init__(self, job: dict[str, Any], dtype: torch.dtype, attention: str = "sdpa") -> None:
        options = {"dtype": dtype, "attn_implementation": attention, "local_files_only": True}
        base = AutoModelForCausalLM.from_pretrained(job["model"], **options)
        settings = {"lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        self.model = peft.get_peft_model(base, peft.LoraConfig(r=job["r"], lora_alpha=job["lora_alpha"], **settings))
        self.model.train()
        # Under our names: base_model.model.NAME.default.weight is NAME.
        self.parameters = {
            name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=job["learning_rate"], weight_decay=0.0)
        self.half = dtype == torch.bfloat16
        if job.get("one_rounding"):
            round_once(self.model)

    def token_losses(self, rows: Rows) -> Tensor:
        """Of each token that has one before it, in the order of the rows."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = ids.masked_fill(mask == 0, -100)[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
        return losses[targets != -100]

    def backward(self, rows: Rows) -> float:
        loss = self.token_losses(rows).mean()
        loss.backward()
        return loss.item()

    def step(self, rows: Rows) -> float:
        loss = self.backward(rows)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def relative(value: Tensor, reference: Tensor) -> float:
    norm = reference.double().norm()
    assert norm > 0, "a reference of nothing shows nothing"
    return ((value.double() - reference.double()).norm() / norm).item()


def gate(job: dict[str, Any]) -> dict[str, Any]:
    """The worst relative errors before and behind the steps.

    Both train on their own, then the losses are compared, and the weights.  For the gradients ours then gets PEFT's
    weights: Adam divides by the gradient's own size, so an element whose gradient is next to nothing moves by
    rounding alone, and at two such points gradients differ by several times what either is off by.  How much of that
    is rounding, PEFT says itself: `itself` is its distance from PEFT with transformers' other attention.
    """
    ours, theirs, itself = Trainee(job), Peft(job, torch.float32), Peft(job, torch.float32, "eager")
    mine = trainable_parameters(ours.model)
    assert mine.keys() == theirs.parameters.keys(), "both train the same tensors"
    for parameters in (mine, theirs.parameters, itself.parameters):
        draw_adapter(parameters, job["seed"], std_of_B=0.02)

    def compare(rows: Rows) -> dict[str, float]:
        keep = Gradients(mine)
        settings = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_batch_tokens": ours.pack_tokens, "seed": (0,)}
        loss, _ = training_step(ours.model, keep, examples_of(rows), **settings)
        reference, other = theirs.backward(rows), itself.backward(rows)
        grads, others = (
            {name: parameter.grad for name, parameter in each.parameters.items()} for each in (theirs, itself)
        )
        found = {
            "loss": abs(loss - reference) / abs(reference),
            "gradient": worst(keep.found, grads),
            "loss, itself": abs(other - reference) / abs(reference),
            "gradient, itself": worst(others, grads),
        }
        theirs.optimizer.zero_grad()
        itself.optimizer.zero_grad()
        return found

    def worst(value: dict[str, Any], reference: dict[str, Any]) -> float:
        return max(relative(value[name], reference[name]) for name in mine)

    before = compare(job["compared"])
    steps = list(steps_of(job["rows"], job["rows_a_step"]))
    for rows in steps:
        ours.step(rows)
        theirs.step(rows)
        itself.step(rows)
    apart = compare(job["compared"])
    with torch.no_grad():
        apart["weights"] = worst(mine, theirs.parameters)
        apart["weights, itself"] = worst(itself.parameters, theirs.parameters)
        for parameters in (mine, itself.parameters):
            for name, parameter in parameters.items():
                parameter.copy_(theirs.parameters[name])
    behind = compare(job["compared"])
    return {
        "before": before,
        "trained, each its own weights": apart,
        "trained, PEFT's weights": behind,
        "tensors": len(mine),
        "steps": len(steps),
        "loss_rel_err": max(found["loss"] for found in (before, apart, behind)),
        "grad_rel_err": max(before["gradient"], behind["gradient"]),
    }


@torch.no_grad()
def bfloat16(job: dict[str, Any]) -> dict[str, Any]:
    """The mean over tokens of |loss in bfloat16 − loss in fp32|, every lora_B drawn.

    Token by token: what is rounded up and what is rounded down cancel in the mean loss, and how well is luck.
    """
    rows = job["compared"]

    def of_peft(dtype: torch.dtype) -> Tensor:
        oracle = Peft(job, dtype)
        draw_adapter(oracle.parameters, job["seed"], std_of_B=0.02)
        return torch.cat([oracle.token_losses([row]) for row in rows]).double()  # without padding

    trainee = Trainee({**job, "dtype": "bfloat16"})
    draw_adapter(dict(trainable_parameters(trainee.model)), job["seed"], std_of_B=0.02)
    found = [torch.empty(0)] * len(rows)
    for batch in flat_batches(trainee.model, examples_of(rows), trainee.pack_tokens):
        each = replace(batch, learnt=[[token] for token in range(len(batch.targets))])  # as if each were a row
        losses = torch.tensor(row_losses(trainee.model, each), dtype=torch.float64)
        for row, learnt in zip(batch.rows, batch.learnt, strict=True):
            found[row] = losses[learnt]
    exact = of_peft(torch.float32)
    sides = {"ours": torch.cat(found), "peft": of_peft(torch.bfloat16)}
    return {
        "tokens": len(exact),
        **{name: (losses - exact).abs().mean().item() for name, losses in sides.items()},
        "mean_loss": {name: losses.mean().item() for name, losses in {"fp32": exact, **sides}.items()},
    }


def overlay(job: dict[str, Any]) -> dict[str, Any]:
    step: Callable[[Rows], float]
    if job["trainer"] == "ours":
        trainee = Trainee(job)
        parameters: dict[str, Tensor] = dict(trainable_parameters(trainee.model))

        def step(rows: Rows) -> float:
            return trainee.step(rows)[1]
    else:
        oracle = Peft(job, getattr(torch, job["dtype"]))
        parameters, step = oracle.parameters, oracle.step
    draw_adapter(parameters, job["seed"], std_of_B=0.0)
    return {"losses": [step(rows) for rows in steps_of(job["rows"], job["rows_a_step"])]}


def main() -> None:
    job = job_io.read()
    result = {"gate": gate, "bfloat16": bfloat16, "overlay": overlay}[job["what"]](job)
    job_io.answer({**result, "versions": job_io.versions("phinetune", "torch", "transformers", "peft")})


if __name__ == "__main__":
    main()
