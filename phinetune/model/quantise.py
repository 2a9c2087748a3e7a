"""A model's weights in fewer bits: `load_in_4bit` by bitsandbytes, as `load_in_8bit` on a GPU; `load_in_8bit` on a CPU.

By bitsandbytes (phinetune.kernels.bnb): every linear layer but the head, as in the QLoRA paper, or those that a model
comes with.

8 bits on a CPU (phinetune.kernels.int8), each layer's error looked at.  Some tokens of text run through the model
once.  Just before a linear layer multiplies, its weight becomes int8, and its own inputs tell by how much the layer's
output is off; a layer that is off by more than `TOLERANCE` stays as it was.  So each layer is judged on what the
quantised layers before it give, and no second copy of the model is ever held.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phinetune.errors import ModelError
from phinetune.kernels import bnb, int8
from phinetune.kernels.quantised import QuantisedWeight
from phinetune.recipe import ModelKwargs

log = logging.getLogger(__name__)

TOLERANCE = 0.05  # of a layer's output, relative; what int8 costs as a rule is 0.01 to 0.02
SAMPLE_TOKENS = 64
SAMPLE_TEXT = (
    "Question: What does a person need in order to learn a language well? Answer: Time, patience and somebody to talk "
    "to. First listen for 10 or 20 minutes a day; then read (aloud, if you can), write a few lines, and have them "
    "corrected. Mistakes don't matter much: those who never make any learn nothing new.\n\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
)


class Quantised(NamedTuple):
    """What of a model is quantised, by the names of its linear layers."""

    names: list[str]
    plain: list[str]
    nbytes: int
    """Of the quantised weights."""
    kinds: list[str]
    """How they are kept, in words."""


def quantise_by_bitsandbytes(model: nn.Module, kwargs: ModelKwargs, device: torch.device) -> None:
    """4 or 8 bits on `device` in the place of the weight of every `nn.Linear` but the output head, which is left with
    the norms and embeddings as it was.

    A weight at a time goes there: a GPU may be too small for the model as it was.

    Raises:
        ModelError: if bitsandbytes isn't installed, or the model has no such layer.
    """
    where = f"model_kwargs.load_in_{4 if kwargs.load_in_4bit else 8}bit"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        what = "needs bitsandbytes, which is not installed"
        raise ModelError(where, what, "pip install 'phinetune[qlora]'") from None
    layers = list(_linear_layers(model))
    for _, layer in layers:
        weight = layer.weight.to(device)
        few_bits = in_4bit(weight, kwargs) if kwargs.load_in_4bit else bnb.quantise_8bit(weight)
        layer.weight = nn.Parameter(few_bits, requires_grad=False)
    if not layers:
        raise ModelError(where, "none of its layers is an nn.Linear that could be quantised", "leave it out")


def in_4bit(weight: Tensor, kwargs: ModelKwargs) -> bnb.FourBitWeight:
    """A weight as the `bnb_4bit_…` settings ask for it."""
    compute = None if kwargs.bnb_4bit_compute_dtype == "auto" else getattr(torch, kwargs.bnb_4bit_compute_dtype)
    return bnb.quantise_4bit(weight, kwargs.bnb_4bit_quant_type, kwargs.bnb_4bit_use_double_quant, compute)


def take_over(model: nn.Module) -> str | None:
    """Plain linear layers with phinetune's weights in the place of bitsandbytes' own layers, which a model that was
    saved in 4 or 8 bits is loaded with; says in which of the two it came."""
    taken = None
    for name, module in list(model.named_modules()):
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        old: Any = module
        plain = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        plain.weight = nn.Parameter(_taken(old, model), requires_grad=False)
        plain.bias = old.bias
        model.set_submodule(name, plain)
        taken = "4 bits" if type(module).__name__ == "Linear4bit" else "8 bits"
    if taken:
        transformer: Any = model
        del transformer.config.quantization_config  # what is saved from here on says for itself how it is kept
    return taken


def _taken(old: Any, model: Any) -> QuantisedWeight:
    """The weight of a layer of bitsandbytes'."""
    if type(old).__name__ == "Linear8bitLt":
        return bnb.EightBitWeight(old.weight.CB, old.weight.SCB, model.dtype)
    compute_dtype = old.compute_dtype or old.weight.quant_state.dtype
    if compute_dtype is torch.float16:  # in which what flows in bfloat16 overflows, and small gradients are zero
        compute_dtype = model.dtype
    return bnb.FourBitWeight(old.weight.data, old.weight.quant_state, compute_dtype)


def quantise_layers(model: nn.Module, ids: Tensor, tolerance: float = TOLERANCE) -> dict[str, float]:
    """int8 in the place of the weight of every `nn.Linear` but the output head, which is left with the norms and
    embeddings as it was.

    Args:
        model: a transformers model that trains nowhere, on the CPU.
        ids: (T,), a sample of text, more than four tokens.
        tolerance: the relative error of a layer's output, above which it isn't quantised.

    Returns:
        The relative error of each layer that the sample went through, by name; other layers aren't quantised.

    Raises:
        ModelError: if the model has no such layer.
    """
    errors: dict[str, float] = {}
    hooks = []
    for name, layer in _linear_layers(model):

        def quantise(layer: Any, args: tuple[Tensor], name: str = name) -> None:
            if name not in errors:
                errors[name] = _quantise_layer(layer, args[0], tolerance)

        hooks.append(layer.register_forward_pre_hook(quantise))
    decoder: Any = getattr(model, "base_model", model)
    try:
        with torch.no_grad():
            decoder(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not errors:
        what = "none of its layers is an nn.Linear that could be in int8"
        raise ModelError("model_kwargs.load_in_8bit", what, "leave it out for this model")
    found = quantised_layers(model)
    for name in found.plain:
        why = f"an error of {errors[name]:.3f} in int8" if name in errors else "seen by none of the sample's tokens"
        log.warning(f"{name} stays in {_dtype_of(model, name)}: {why}")
    return errors


def quantised_layers(model: nn.Module) -> Quantised:
    """Which layers' weights are quantised, and which aren't, with LoRA or without; the head counts as neither."""
    layers = list(_linear_layers(model, of_any_kind=True))
    weights = {name: layer.weight for name, layer in layers if isinstance(layer.weight, QuantisedWeight)}
    plain = [name for name, layer in layers if name not in weights]
    kinds = sorted({weight.KIND for weight in weights.values()})
    return Quantised(list(weights), plain, sum(weight.nbytes for weight in weights.values()), kinds)


def dequantise_layers(model: nn.Module) -> None:
    """Plain weights in the place of quantised ones: what a model is saved with that others are to read."""
    for _, layer in _linear_layers(model, of_any_kind=True):
        if isinstance(layer.weight, QuantisedWeight):
            layer.weight = nn.Parameter(layer.weight.dequantise(), requires_grad=False)


def sample_ids(tokenizer: Any | None, vocabulary: int) -> Tensor:
    """(T,) ids of a text; of no text where there is no tokenizer."""
    ids = tokenizer(SAMPLE_TEXT)["input_ids"][:SAMPLE_TOKENS] if tokenizer is not None else []
    if len(ids) > int8.FEW and max(ids) < vocabulary:
        return torch.tensor(ids)
    return torch.randint(vocabulary, (SAMPLE_TOKENS,), generator=torch.Generator().manual_seed(0))


def _quantise_layer(layer: nn.Linear, x: Tensor, tolerance: float) -> float:
    """Puts int8 into a layer if it bears it; returns the error that int8 has there."""
    weight = layer.weight
    quantised = int8.quantise(weight)
    error = int8.relative_error(x.reshape(-1, x.shape[-1]), weight, quantised)
    if error <= tolerance:  # NaN is more than any tolerance
        layer.weight = nn.Parameter(quantised, requires_grad=False)
    return error


def _linear_layers(model: nn.Module, of_any_kind: bool = False) -> Iterator[tuple[str, Any]]:
    transformer: Any = model
    head = transformer.get_output_embeddings()
    for name, module in model.named_modules():
        wanted = isinstance(module, nn.Linear) if of_any_kind else type(module) is nn.Linear
        if wanted and module is not head:
            yield name, module


def _dtype_of(model: nn.Module, name: str) -> str:
    return str(model.get_submodule(name).weight.dtype).removeprefix("torch.")
