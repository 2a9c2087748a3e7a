"""One line for those who train with other trainers: `phinetune.accelerate(model)`.

A transformers model, plain or with PEFT's layers in it, gets phinetune's decoder layers, a backbone that lays a padded
batch into one flat line, and a causal LM that computes its loss over the supervised tokens alone:

    input_ids  [ . . a a ]    line           [ a a b b b b ]    hidden states  [ 0 0 a a ]
               [ b b b b ]    position_ids   [ 2 3 0 1 2 3 ]                   [ b b b b ]

Each is a subclass of the model's own class, which an object is given in place: whoever holds the model goes on holding
it.  What isn't a batch to train or evaluate on (generation with a cache, embeddings as inputs, masks of four
dimensions, recorded hidden states) goes to transformers' own forward pass, unchanged.

Shape suffixes: B rows, W columns of the padded batch, T tokens of the line, D hidden width, N supervised tokens.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.utils import can_return_tuple

from phinetune.kernels import Path, linear_cross_entropy_sum, separate
from phinetune.layers import attention, fast
from phinetune.layers.in_place import InPlace
from phinetune.layers.projection import computing_dtype, is_watched
from phinetune.model.family import long_rope_boundary, takes_flat_batches

Model = TypeVar("Model", bound=nn.Module)
log = logging.getLogger(__name__)

IGNORED = -100
REPLACED = ("sdpa", "eager")  # attention of transformers whose place ours takes


def accelerate(model: Model) -> Model:
    """Makes a model train and evaluate faster in any trainer, with the same loss and the same gradients.

    For Llama, Phi-3, Mistral and Qwen2, alone or in a `PeftModel`, before or after the adapter is put in.  Layers take
    the fast path whose base weights are frozen and in the dtype that is computed in (that of autocast, where it is on).
    While a model trains, a call with `labels` gives the loss without logits; `skip_logits=False` gives both.
    Parameters, state dict, `save_pretrained` and `generate` stay what they are.  Attention is computed by phinetune, so
    there are no attention weights to return: `model.set_attn_implementation("eager")` brings them, and the plain way;
    so does "sdpa", which `generate_batch` wants.

    Returns:
        The same object, changed in place. A second call changes nothing.
    """
    attention.register()
    installed = fast.install(model)
    # Softmax over a row's places, padding's among them, is over what these have there.
    answers = {
        id(m) for asked in model.modules() if isinstance(asked, GenericForQuestionAnswering) for m in asked.modules()
    }
    changed: list[Any] = [m for m in model.modules() if type(m) in ACCELERATED and id(m) not in answers]
    for module in changed:
        module.__class__ = ACCELERATED[type(module)]
        if module.config._attn_implementation in REPLACED:
            module.set_attn_implementation(attention.NAME)
    backbones = [module for module in model.modules() if isinstance(module, FlatBackbone)]
    if not backbones:
        kinds = ", ".join(sorted(base.__name__ for base in ACCELERATED if issubclass(ACCELERATED[base], FlatBackbone)))
        log.warning(f"accelerate: {type(model).__name__} stays as it is: there is none of {kinds} in it")
    if any("forward" in m.__dict__ for m in model.modules() if isinstance(m, InPlace)):
        log.warning("accelerate: modules with a forward of their own, as device_map gives them, stay as they are")
    for backbone in backbones:
        if not takes_flat_batches(backbone):
            found = f"attention {backbone.config._attn_implementation!r}, dropout {backbone.config.attention_dropout}"
            log.warning(f"accelerate: {found}: batches stay padded; sdpa or eager without dropout has a fast form")
    log.debug(f"accelerate: {installed} layers, {len(changed)} models")
    return model


class Line(NamedTuple):
    """A batch's real tokens end to end."""

    ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), those that the padded batch has
    paths: list[Path]
    places: Tensor | None  # (T,) of the B·W places of the batch; None where none is padding


class FlatBackbone(InPlace):
    """A decoder without its head."""

    config: Any
    embed_tokens: Any
    layers: Any
    keeps_padding = False
    """For a call, whether the hidden states of padding are computed, too."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, the hidden states (B, W, D) of padding zero, but where it is kept.

        In training nothing is cached unless `use_cache` asks for it, whatever the config says.
        """
        if use_cache is None and self.training:
            use_cache = False
        line = None
        if not (self.keeps_padding or past_key_values is not None or inputs_embeds is not None or input_ids is None):
            wants_cache = self.config.use_cache if use_cache is None else use_cache
            if not wants_cache and self._takes_lines(kwargs):
                line = line_of(input_ids, attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        if line is None or not _same_rotary(self.config, input_ids, position_ids, line):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        assert input_ids is not None
        own = {"input_ids": line.ids, "position_ids": line.position_ids, "use_cache": False, "paths": line.paths}
        output = super().forward(**own, attention_mask=attention.unread_mask(line.ids), **kwargs)
        output.last_hidden_state = _put_back(output.last_hidden_state[0], line.places, input_ids.shape)
        return output

    def _takes_lines(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call may be computed in a line, by the settings that it comes with."""

        def asked(name: str, default: Any) -> Any:
            return kwargs.get(name, getattr(self.config, name, default))

        as_it_is = "paths" in kwargs or asked("output_hidden_states", False) or asked("output_attentions", False)
        plain = asked("return_dict", True) is not False and asked("is_causal", True) is not False
        as_it_is = as_it_is or torch.compiler.is_compiling() or self._is_told_of_rows()
        as_it_is = as_it_is or not all(fast.is_known(getattr(layer, "self_attn", layer)) for layer in self.layers)
        return bool(plain and not as_it_is and takes_flat_batches(self))

    def _is_told_of_rows(self) -> bool:
        """Whether somebody's hooks go by a batch's rows: noise by the shape of embeddings (NEFTune), PEFT's adapters of
        each row."""
        of_embeddings = self.embed_tokens._forward_hooks.values()
        if any("require_grad" not in getattr(hook, "__qualname__", "") for hook in of_embeddings):
            return True
        hooks = (hook for module in self.modules() for hook in module._forward_pre_hooks.values())
        return any(getattr(hook, "func", hook).__module__.startswith("peft.") for hook in hooks)


class LeanCausalLM(InPlace):
    """A causal LM that computes logits of supervised tokens only, a few hundred at a time, while it trains."""

    config: Any
    model: Any
    lm_head: Any
    loss_function: Any
    has_said_so = False  # that labels have tokens that padding predicts

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own; with `labels` (B, W) the loss alone where `skip_logits`, by default in training.

        The loss is the mean over supervised tokens, or their sum over `num_items_in_batch`.
        """
        skip_logits = self.training if skip_logits is None else skip_logits
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
        }  # fmt: skip
        keeps_some = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        is_plain = labels is not None and skip_logits and not keeps_some and self._has_plain_loss(kwargs)
        with self._keeping_padding(labels, attention_mask):
            if labels is None or not is_plain:
                return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
            outputs = self.model(**inputs, **kwargs, return_dict=True)
        loss = _mean_loss(outputs.last_hidden_state, self.lm_head.weight, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @contextmanager
    def _keeping_padding(self, labels: Tensor | None, attention_mask: Any) -> Iterator[None]:
        """Its hidden states count where a token is supervised that padding predicts, as wrong as they are."""
        if labels is None or torch.compiler.is_compiling() or not _learns_from_padding(labels, attention_mask):
            yield
            return
        if not self.has_said_so:
            self.has_said_so = True
            log.warning(
                "accelerate: the labels have tokens that padding predicts, so padding is computed, too; with "
                'tokenizer.padding_side = "right" there are none'
            )
        self.model.keeps_padding = True
        try:
            yield
        finally:
            del self.model.keeps_padding

    def _has_plain_loss(self, kwargs: dict[str, Any]) -> bool:
        head = self.lm_head
        learns = head.weight.requires_grad and torch.is_grad_enabled()
        plain = type(head) is nn.Linear and head.bias is None and not learns and not is_watched(head)
        as_it_is = "shift_labels" in kwargs or "ignore_index" in kwargs
        as_it_is |= not kwargs.get("return_dict", getattr(self.config, "return_dict", True))
        as_it_is |= torch.compiler.is_compiling()
        return plain and not as_it_is and self.loss_function is ForCausalLMLoss


def line_of(
    ids_BW: Tensor, attention_mask: Any, position_ids: Tensor | None, cu_seq_lens: Tensor | None = None
) -> Line | None:
    """A batch as transformers takes it, in a line; None where it has no such form.

    Args:
        ids_BW: (B, W) token ids.
        attention_mask: (B, W), 1 for real tokens, which are one piece of each row; None where all are real.
        position_ids: (B, W) or (1, W). Without a mask rows are packed, and another example begins where positions
            don't go on.
        cu_seq_lens: (examples + 1,) bounds of the examples in a single row, which says the same.
    """
    rows, width = ids_BW.shape
    columns = torch.arange(width, device=ids_BW.device)
    positions_BW = (columns if position_ids is None else position_ids).expand(rows, width)
    if attention_mask is None:
        if cu_seq_lens is not None and rows == 1:
            bounds = cu_seq_lens.tolist()
            if position_ids is None:
                starts = torch.repeat_interleave(cu_seq_lens[:-1].long(), cu_seq_lens.diff().long())
                positions_BW = (columns - starts)[None]
        else:
            goes_on = positions_BW.diff(dim=1) == 1
            begins_BW = torch.cat([goes_on.new_ones(rows, 1), ~goes_on], dim=1)
            bounds = [*begins_BW.flatten().nonzero()[:, 0].tolist(), rows * width]
        bounds = sorted(set(bounds))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != rows * width:
            return None
        return Line(ids_BW.reshape(1, -1), positions_BW.reshape(1, -1), separate(bounds), None)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids_BW.shape:
        return None
    real_BW = attention_mask.to(ids_BW.device) != 0
    lengths_B = real_BW.sum(1)
    pieces_B = real_BW[:, 0].long() + (real_BW[:, 1:] & ~real_BW[:, :-1]).sum(1)
    if bool((pieces_B > 1).any()) or not int(lengths_B.sum()):
        return None
    bounds = sorted({0, *lengths_B.cumsum(0).tolist()})  # a row of padding alone adds none
    places_T = real_BW.flatten().nonzero()[:, 0]
    places = None if len(places_T) == rows * width else places_T
    ids_T, positions_T = ids_BW.flatten()[places_T], positions_BW.flatten()[places_T]
    return Line(ids_T[None], positions_T[None], separate(bounds), places)


def _same_rotary(config: Any, ids_BW: Tensor | None, position_ids: Tensor | None, line: Line) -> bool:
    """Whether angles are the padded batch's: some kinds of RoPE go by the largest position, padding's included."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    boundary = long_rope_boundary(config)
    if ids_BW is None or (boundary is None and "dynamic" not in kind):
        return True
    padded = ids_BW.shape[1] if position_ids is None else int(position_ids.max()) + 1
    real = int(line.position_ids.max()) + 1
    return real == padded if boundary is None else (real > boundary) == (padded > boundary)


def _put_back(hidden_TD: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """(T, D) -> (B, W, D), padding zero."""
    if places is not None:
        hidden_TD = hidden_TD.new_zeros(shape.numel(), hidden_TD.shape[1]).index_copy(0, places, hidden_TD)
    return hidden_TD.view(*shape, -1)


def _learns_from_padding(labels: Tensor, attention_mask: Any) -> bool:
    """Whether a token is supervised that padding predicts."""
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != labels.shape:
        return False
    return bool(((labels[:, 1:] != IGNORED) & (attention_mask[:, :-1].to(labels.device) == 0)).any())


def _mean_loss(hidden_BWD: Tensor, head_VD: Tensor, labels: Tensor, items: Any) -> Tensor:
    """What `ForCausalLMLoss` gives of logits: an fp32 scalar."""
    labels = labels.to(hidden_BWD.device)
    supervised = labels[:, 1:] != IGNORED
    hidden_ND, targets_N = hidden_BWD[:, :-1][supervised], labels[:, 1:][supervised]
    if len(targets_N):
        dtype = computing_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            total = linear_cross_entropy_sum(hidden_ND.to(dtype), head_VD.to(dtype), targets_N)
    else:
        total = hidden_ND.float().sum()
    if items is None:
        return total / len(targets_N) if len(targets_N) else total * torch.nan
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


class _Llama(FlatBackbone, LlamaModel):
    pass


class _Mistral(FlatBackbone, MistralModel):
    pass


class _Phi3(FlatBackbone, Phi3Model):
    pass


class _Qwen2(FlatBackbone, Qwen2Model):
    pass


class _LlamaLM(LeanCausalLM, LlamaForCausalLM):
    pass


class _MistralLM(LeanCausalLM, MistralForCausalLM):
    pass


class _Phi3LM(LeanCausalLM, Phi3ForCausalLM):
    pass


class _Qwen2LM(LeanCausalLM, Qwen2ForCausalLM):
    pass


ACCELERATED = {base: cls for base, cls in InPlace.made.items() if issubclass(cls, FlatBackbone | LeanCausalLM)}
