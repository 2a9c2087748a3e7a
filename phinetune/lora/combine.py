"""Several adapters made into one, by the names of PEFT's `add_weighted_adapter`.

cat       A and B stacked: exactly Σ weight · ΔW, of the ranks' sum
svd       the best approximation of Σ weight · ΔW of a given rank
linear    A = Σ √w Aᵢ, B = Σ √w Bᵢ (as PEFT has it): near the weighted sum only where adapters are near each other
ties      entries pruned by size, then only those of the majority's sign are averaged (Yadav et al., 2023)
dare_…    entries dropped at random and the rest scaled up (Yu et al., 2023), then linear or ties
…_svd     the same on ΔW in place of A and B, and the result's SVD
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from phinetune.lora.biases import trained_biases
from phinetune.lora.layer import LoRALayer, Product
from phinetune.lora.modules_to_save import saved_modules
from phinetune.lora.switch import adapter_names, check_known, lora_layers
from phinetune.lora.targets import TargetError

Combination = Literal[
    "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SignMethod = Literal["total", "frequency"]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Combination = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
) -> None:
    """Adds an adapter that combines others; they stay, and what is active doesn't change.

    Args:
        model: with the adapters.
        adapters, weights: what is combined, a weight each (below 0 takes away).
        adapter_name: of the result, whose lora_alpha is its rank: its scaling is 1.
        combination_type: see above.
        svd_rank: of the result of an SVD; the largest rank among the adapters by default.
        density: share of entries that ties, dare and magnitude_prune keep, 0 < density ≤ 1. dare draws from torch's
            generator.
        majority_sign_method: the sign of an entry's sum, or that of most adapters.

    Raises:
        TargetError: for unknown adapters, a name that is taken, DoRA (a norm can't be added up), or ranks that differ
            where A and B are combined; nothing is changed.
    """
    if combination_type not in get_args(Combination):
        raise TargetError(f"combination_type={combination_type!r}: must be one of {', '.join(get_args(Combination))}")
    if len(adapters) != len(weights) or not adapters:
        raise TargetError(f"{len(adapters)} adapters and {len(weights)} weights: give a weight for each")
    prunes = combination_type.removesuffix("_svd") in FACTORWISE[1:]
    if svd_rank is not None and (svd_rank < 1 or "svd" not in combination_type):
        raise TargetError(f"svd_rank={svd_rank}: a rank of 1 or more, for a combination by SVD")
    if density is not None and not prunes:
        raise TargetError(f"density={density}: {combination_type} prunes nothing")
    if prunes and (density is None or not 0 < density <= 1):
        raise TargetError(f"density={density}: {combination_type} keeps a share of the entries, above 0 and up to 1")
    if majority_sign_method not in get_args(SignMethod):
        raise TargetError(f"majority_sign_method={majority_sign_method!r}: must be total or frequency")
    if trained_biases(model):
        raise TargetError("bias: trained biases can't be combined")
    for path, wrapper in saved_modules(model):
        if any(name in wrapper.modules_to_save for name in adapters):
            raise TargetError(f"modules_to_save: {path} was trained whole, and whole modules can't be combined")
    if adapter_name in adapter_names(model):
        raise TargetError(f"adapter_name={adapter_name!r}: the model has an adapter of that name")
    check_known(model, adapters)

    results: list[tuple[LoRALayer, Product]] = []
    for path, layer in lora_layers(model):
        shares = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.adapters]
        if any(layer.adapters[name].use_dora for name, _ in shares):
            raise TargetError(f"{path} uses DoRA: its norms can't be added up")
        if shares:
            products = [layer.product(name) for name, _ in shares]
            ranks = [product.lora_A.shape[0] for product in products]
            if combination_type in FACTORWISE and len(set(ranks)) > 1:
                raise TargetError(f"{path}: {combination_type} adds As and Bs of one rank, and these are {ranks}")
            own_weights = [weight for _, weight in shares]
            rank = svd_rank or max(ranks)
            combined = _combine(products, own_weights, combination_type, rank, density or 1.0, majority_sign_method)
            results.append((layer, combined))
    for layer, combined in results:
        add_product(layer, adapter_name, combined)


def add_product(layer: LoRALayer, adapter_name: str, product: Product) -> None:
    """Adds an adapter with given matrices to a layer, frozen and not active."""
    r = product.lora_A.shape[0]
    active, dtype = layer.active_adapters, product.lora_A.dtype
    layer.add_adapter(adapter_name, layer.make_adapter(r=r, lora_alpha=product.scaling * r), dtype)
    layer.active_adapters = active
    layer.load_product(adapter_name, product.lora_A, product.lora_B)
    for name in layer.lora_tensors(adapter_name):
        layer.get_parameter(name).requires_grad_(False)


def _combine(
    products: Sequence[Product],
    weights: Sequence[float],
    combination_type: str,
    rank: int,
    density: float,
    majority_sign_method: str,
) -> Product:
    scaled = [weight * product.scaling for weight, product in zip(weights, products, strict=True)]
    if combination_type == "cat":
        lora_A = torch.cat([share * product.lora_A for share, product in zip(scaled, products, strict=True)])
        return Product(lora_A, torch.cat([product.lora_B for product in products], dim=1), 1.0)
    method = combination_type.removesuffix("_svd")
    if method == "svd" or combination_type.endswith("_svd"):
        deltas = [product.scaling * (product.lora_B.float() @ product.lora_A.float()) for product in products]
        delta = _add_up(deltas, weights, method, density, majority_sign_method)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        dtype = products[0].lora_A.dtype
        return Product(vh[:rank].to(dtype), (u[:, :rank] * s[:rank]).to(dtype), 1.0)
    roots_B = [math.sqrt(abs(share)) for share in scaled]
    roots_A = [math.copysign(root, share) for root, share in zip(roots_B, scaled, strict=True)]
    lora_A = _add_up([p.lora_A for p in products], roots_A, method, density, majority_sign_method)
    lora_B = _add_up([p.lora_B for p in products], roots_B, method, density, majority_sign_method)
    return Product(lora_A, lora_B, 1.0)


def _add_up(tensors: Sequence[Tensor], weights: Sequence[float], method: str, density: float, sign: str) -> Tensor:
    """Σ weight · tensor, of what pruning leaves and, by ties, of the entries with the majority's sign."""
    if method.startswith("dare"):
        tensors = [t * torch.bernoulli(torch.full_like(t, density)) / density for t in tensors]
    elif method in ("ties", "magnitude_prune"):
        tensors = [_largest(t, density) for t in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * stacked.new_tensor(weights).view(-1, *[1] * tensors[0].ndim)
    if not method.endswith("ties"):
        return weighted.sum(0)
    votes = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The share of entries that are largest by size; zeros elsewhere."""
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)
