"""Base model and tokenizer: load, adapt, and what is particular to a family."""

from phinetune.model.adapted import adapt_model
from phinetune.model.family import (
    flat_batches,
    fused_parts,
    has_position_table,
    long_rope_boundary,
    loss_sum,
    row_losses,
    takes_flat_batches,
)
from phinetune.model.load import (
    filed_dtype,
    full_name,
    hub_name,
    is_on_hub,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    resolve_dtype,
    revision_of,
    version_of,
)
from phinetune.model.quantise import dequantise_layers, quantised_layers
from phinetune.model.stops import stop_ids

__all__ = [
    "adapt_model",
    "dequantise_layers",
    "filed_dtype",
    "flat_batches",
    "full_name",
    "fused_parts",
    "has_position_table",
    "hub_name",
    "is_on_hub",
    "load_config",
    "load_model",
    "load_tokenizer",
    "long_rope_boundary",
    "loss_sum",
    "pick_device",
    "quantised_layers",
    "resolve_dtype",
    "revision_of",
    "row_losses",
    "stop_ids",
    "takes_flat_batches",
    "version_of",
]
