"""Embeddings with LoRA."""

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.lora.layer import DEFAULT, Adapter, LoRALayer, Product, full_precision


class Embedding(LoRALayer, nn.Embedding):
    """`nn.Embedding` with a low-rank update: y = W[ids] + (lora_alpha / r) · Aᵀ[ids] Bᵀ.

    Args:
        num_embeddings, embedding_dim: as in `nn.Embedding`.
        r, lora_alpha, merge_weights, use_rslora, use_dora: as in `Linear`.
        init_lora_weights: True (A zeros, B from N(0, 1), as in loralib) or False (both from N(0, 1): for tests).
        **kwargs: those of `nn.Embedding`. There is no dropout, as in loralib and PEFT.
            `max_norm` bounds the rows of W that are looked up, and not W in place.

    Shapes:
        input (...), output (..., embedding_dim), `lora_A` (r, num_embeddings), `lora_B` (embedding_dim, r).

    Raises:
        ValueError: for a negative r or another `init_lora_weights`.
    """

    _plain_type = nn.Embedding
    _output_dim: ClassVar[int] = 1
    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.merge_weights = merge_weights
        adapter = self.make_adapter(
            r=r,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
        )
        if r > 0:
            self._register(DEFAULT, adapter)
        else:
            self._asked_for = adapter
        if kwargs.get("_weight") is None:
            self.reset_parameters()  # a second time, as loralib does: the same seed gives the same layer
        elif r > 0:
            self.reset_lora_parameters()

    def make_adapter(self, **given: Any) -> Adapter:
        given.pop("lora_dropout", None)
        adapter = Adapter(**given)
        adapter.refuse("pissa", "olora", "gaussian", of="embeddings")
        return adapter

    def _shapes(self, adapter: Adapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (adapter.r, self.num_embeddings), (self.embedding_dim, adapter.r)  # type: ignore[return-value]

    def _initialise(self, adapter_name: str) -> None:
        lora_A = self.lora_tensor("lora_A", adapter_name)
        if self.adapters[adapter_name].init_lora_weights is False:
            nn.init.normal_(lora_A)
        else:
            nn.init.zeros_(lora_A)
        nn.init.normal_(self.lora_tensor("lora_B", adapter_name))

    def _base(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.has_lora:
            return nn.Embedding.forward(self, input)
        if weight is not self.weight:  # merged: its rows were bounded before ΔW was added
            return F.embedding(input, weight)
        how = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}  # where it trains, too
        rows = F.embedding(input, weight, self.padding_idx, **how)
        return rows if self.max_norm is None else _bounded(rows, self.max_norm, self.norm_type)

    def _update(self, input: Tensor, adapter_name: str) -> Tensor:
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        thin = F.embedding(input, lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        update: Tensor = (thin @ lora_B.T) * self.adapters[adapter_name].scaling
        return update

    def to_base(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Its rows are bounded already where there is a `max_norm`: bounding W + ΔW would be another function."""
        plain = super().to_base(dtype)
        if self.active_adapters:
            plain.max_norm = None  # type: ignore[assignment]
        return plain

    def _weight_to_merge(self) -> Tensor:
        return self.weight if self.max_norm is None else _bounded(self.weight, self.max_norm, self.norm_type)

    def delta_weight(self, adapter_name: str = DEFAULT) -> Tensor:
        """ΔW (num_embeddings, embedding_dim) in fp32 (fp64 for fp64 parameters)."""
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        with full_precision(self.weight.device):
            delta: Tensor = (lora_A.T.to(dtype) @ lora_B.T.to(dtype)) * self.adapters[adapter_name].scaling
        return delta

    @torch.no_grad()
    def product(self, adapter_name: str = DEFAULT) -> Product:
        """ΔWᵀ = scaling · B @ A."""
        lora_A, lora_B = self.lora_tensor("lora_A", adapter_name), self.lora_tensor("lora_B", adapter_name)
        return Product(lora_A.detach(), lora_B.detach(), self.adapters[adapter_name].scaling)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **lora: Any,
    ) -> Self:
        """As `nn.Embedding.from_pretrained`, on the very tensor that is given; `r`, `lora_alpha`, … behind."""
        plain: dict[str, Any] = {"padding_idx": padding_idx, "max_norm": max_norm, "norm_type": norm_type}
        num_embeddings, embedding_dim = embeddings.shape
        return cls(
            num_embeddings,
            embedding_dim,
            **lora,
            **plain,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=embeddings,
            _freeze=freeze,
        )


def _bounded(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Each row scaled down to `max_norm` where it is longer, as torch.embedding_renorm_ does in place."""
    norm = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    return torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)
