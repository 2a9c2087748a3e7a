"""Decoder layers that run flat batches by phinetune's kernels, in the place of transformers' own.

    hidden states -> norm, q k v -> rotary, attention -> o, + residual -> norm, gate up, down, + residual

They are subclasses of transformers' layers and hold the same modules, so state dicts, hooks on a layer, generation and
everything that isn't a flat batch stay what they were: those go to the layer's own forward pass, which is also the
reference.  `install` gives a model's layers that class.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3MLP, Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from phinetune.kernels import Path
from phinetune.kernels.attention import rotary_attention
from phinetune.layers import blockwise, whole
from phinetune.layers.decoder import linear_add, norm_gated_mlp, norm_linears
from phinetune.layers.in_place import InPlace
from phinetune.layers.projection import computing_dtype, is_watched, projection_of
from phinetune.layers.ready import Attention, Norm, Parts, Ready
from phinetune.lora.functional import side_by_side

ATTENTIONS = (LlamaAttention, MistralAttention, Phi3Attention, Qwen2Attention)
MLPS = (LlamaMLP, MistralMLP, Phi3MLP, Qwen2MLP)
NORMS = (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm)


class FastLayer(InPlace):
    """What a decoder layer does with a flat batch; beside it in the classes below stands transformers' layer."""

    windowed = False  # whether attention takes a window that the configuration names
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        paths: Sequence[Path] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(1, T, D) -> (1, T, D) where `paths` say who sees whom (phinetune.kernels.attention); else transformers' way.

        Under autocast the fast path is taken where the weights have its dtype, and computes without it.
        """
        ready, dtype = None, computing_dtype(hidden_states)
        if paths is not None and position_embeddings is not None and past_key_values is None:
            ready = self._ready(dtype)
        if ready is None or position_embeddings is None or paths is None:
            output: Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **({} if paths is None else {"paths": paths}),
                **kwargs,
            )
            return output
        with torch.autocast(hidden_states.device.type, enabled=False):
            x_TD, cos_TR, sin_TR = (tensor.squeeze(0).to(dtype) for tensor in (hidden_states, *position_embeddings))
            return self._flat(x_TD, cos_TR, sin_TR, paths, ready).to(hidden_states.dtype)[None]

    def _flat(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, paths: Sequence[Path], ready: Ready) -> Tensor:
        if ready.serves(x_TD):
            return whole.decoder_layer(x_TD, cos_TR, sin_TR, paths, ready)
        parts, (norm, norm_mlp), (kv_heads, scaling, window, head_width) = ready.parts, ready.norms, ready.attention
        qkv_TN = norm_linears(x_TD, *norm, parts.qkv)
        attended_TN = rotary_attention(qkv_TN, cos_TR, sin_TR, kv_heads, paths, scaling, window, head_width)
        x_TD = linear_add(attended_TN, x_TD, parts.o)
        return norm_gated_mlp(x_TD, *norm_mlp, parts.gate_up, parts.down)

    def _ready(self, dtype: torch.dtype) -> Ready | None:
        """The layer as it is; None if the fast path isn't for it.  Looked at once while `settled`."""
        known: dict[Any, Ready | None] = self.__dict__.get("_known", {})
        if (key := (dtype, self.training, torch.is_grad_enabled())) not in known:
            parts = self._parts(dtype)
            known[key] = None if parts is None else Ready(parts, self._norms(), self._attention())
        return known[key]

    def _norms(self) -> tuple[Norm, Norm]:
        return Norm.of(self.input_layernorm), Norm.of(self.post_attention_layernorm)

    def _attention(self) -> Attention:
        attention = self.self_attn
        window = getattr(attention.config if self.windowed else attention, "sliding_window", None)
        return Attention(attention.config.num_key_value_heads, attention.scaling, window, attention.head_dim)

    def _parts(self, dtype: torch.dtype) -> Parts | None:
        """The layer's linear layers; None if one does more than a product and a low-rank update, or something trains
        that the fast path gives no gradient."""
        attention, mlp = self.self_attn, self.mlp
        norms = (self.input_layernorm, self.post_attention_layernorm)
        activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
        own = (attention, mlp, activation, *norms)
        # Somebody else's, or watched by them.
        if type(mlp) not in MLPS or any(type(norm) not in NORMS for norm in norms) or any(map(is_watched, own)):
            return None
        if not is_known(attention) or not isinstance(activation, nn.SiLU | SiLUActivation):
            return None
        # Products that a checkpoint keeps by their name are changed in place here.
        if "context_fn" in getattr(getattr(self, "_gradient_checkpointing_func", None), "keywords", {}):
            return None
        config = attention.config
        if getattr(config, "attention_dropout", False):
            return None
        if self.training and getattr(config, "resid_pdrop", False):
            return None
        if any(norm.weight.requires_grad or norm.weight.dtype != dtype for norm in norms):
            return None
        if hasattr(attention, "qkv_proj"):
            groups = ([attention.qkv_proj], [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj])
        else:
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            groups = (qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        parts = []
        for modules in groups:
            projections = [projection_of(module, dtype) for module in modules]
            if any(projection is None for projection in projections):
                return None
            parts.append(side_by_side([projection for projection in projections if projection is not None]))
        return Parts(*parts)


@contextlib.contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Here nobody changes modules, hooks, adapters or weights of a model: its layers look at themselves once."""
    layers = [module for module in model.modules() if isinstance(module, FastLayer)]
    for layer in layers:
        layer.__dict__["_known"] = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_known", None)


def is_known(attention: nn.Module) -> bool:
    """Whether an attention module is causal and transformers' own: `paths` say nothing to any other."""
    is_own = type(attention) in ATTENTIONS and "forward" not in attention.__dict__
    return is_own and bool(getattr(attention, "is_causal", True))


class FastLlamaDecoderLayer(FastLayer, LlamaDecoderLayer):
    pass


class FastMistralDecoderLayer(FastLayer, MistralDecoderLayer):
    windowed = True


class FastPhi3DecoderLayer(FastLayer, Phi3DecoderLayer):
    windowed = True


class FastQwen2DecoderLayer(FastLayer, Qwen2DecoderLayer):
    pass


class FastNorm(InPlace):
    """The norm behind the last layer where it learns: in plain torch it is a dozen passes, half of them in fp32."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if blockwise.serves_norm(hidden_states, self.weight):
            return blockwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        output: Tensor = super().forward(hidden_states)
        return output


class FastLlamaRMSNorm(FastNorm, LlamaRMSNorm):
    pass


class FastMistralRMSNorm(FastNorm, MistralRMSNorm):
    pass


class FastPhi3RMSNorm(FastNorm, Phi3RMSNorm):
    pass


class FastQwen2RMSNorm(FastNorm, Qwen2RMSNorm):
    pass


FAST_LAYERS = {base: cls for base, cls in InPlace.made.items() if issubclass(cls, FastLayer)}
FAST_NORMS = {base: cls for base, cls in InPlace.made.items() if issubclass(cls, FastNorm)}


def install(model: nn.Module) -> int:
    """Makes fast layers of those that have such a class, wherever they are in a model, and fast norms of those that
    stand beside them; returns how many layers."""
    changed = _change(model, FAST_LAYERS)
    for module in model.modules():
        if any(isinstance(layer, FastLayer) for layers in module.children() for layer in layers.children()):
            for norm in module.children():
                norm.__class__ = FAST_NORMS.get(type(norm), type(norm))
    return changed


def uninstall(model: nn.Module) -> None:
    """transformers' own layers again."""
    _change(model, {fast: base for base, fast in (FAST_LAYERS | FAST_NORMS).items()})


def _change(model: nn.Module, to: Mapping[type[nn.Module], Any]) -> int:
    found = [module for module in model.modules() if type(module) in to]
    for module in found:
        module.__class__ = to[type(module)]
    return len(found)
