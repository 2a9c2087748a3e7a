"""What a run says of itself before its first step: rows, model, machine, expected time and memory."""

import logging

from phinetune.data import Prepared
from phinetune.kernels import native
from phinetune.lora import lora_layers
from phinetune.model import quantised_layers, takes_flat_batches
from phinetune.model.memory import decoder_layers, recomputed_layers
from phinetune.train.estimate import expected_seconds
from phinetune.train.loop import Loop

log = logging.getLogger(__name__)


def announce(loop: Loop, data: Prepared, threads: str, expected_gb: float) -> None:
    """
    Args:
        threads: which compute, in words.
        expected_gb: memory (10⁹ bytes), worked out before a rehearsal.
    """
    _announce_rows(data)
    _announce_model(loop, threads)
    _announce_steps(loop, data, expected_gb)


def _announce_rows(data: Prepared) -> None:
    for name, ledger in data.ledgers.items():
        log.info(
            f"{name}: {ledger.used:,} rows of {ledger.source} used, {ledger.rejected:,} rejected; "
            f"{ledger.tokens:,} tokens, {ledger.supervised:,} of them supervised"
        )
        for rejected in ledger.first_rejected[:5]:
            log.warning(f"left out {rejected.where}: {rejected.reason}")
        for words, count in ledger.dropped.items():
            log.warning(f"left out {count:,} rows that {words}")
        for finding, (count, places) in ledger.findings.items():
            log.warning(f"{count:,} rows {finding.words} ({places[0]}{' …' if count > 1 else ''})")


def _announce_model(loop: Loop, threads: str) -> None:
    model = loop.model
    layers = len(list(lora_layers(model)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = loop.recipe.model_kwargs.dtype
    log.info(f"model: {loop.base.model} in {dtype}, {layers} layers adapted, {trained:,} trainable parameters")
    if model.device.type == "cpu":
        kernels = native.kernels_for(model.dtype)
        log.info(f"device: cpu, {threads}{'; C++ kernels: ' + ', '.join(kernels) if kernels else ''}")
    if (quantised := quantised_layers(model)).names:
        names, plain = quantised.names, quantised.plain
        log.info(
            f"{' and '.join(quantised.kinds)}: {len(names)} of {len(names) + len(plain)} linear layers, "
            f"{quantised.nbytes / 1e9:.2f} GB" + (f"; in {dtype} stay {', '.join(plain)}" if plain else "")
        )
    if loop.recipe.training_config.save_total_limit == 1:
        log.info("save_total_limit=1: the two newest checkpoints are kept, so that a damaged one has one behind it")
    if not takes_flat_batches(model):
        log.info(f"{model.config.model_type} models take the general path: a row at a time")


def _announce_steps(loop: Loop, data: Prepared, expected_gb: float) -> None:
    model = loop.model
    left = loop.steps.rows_from(loop.step)
    tokens = int(data.train.lengths[left].sum())
    supervised = int(data.train.supervised[left].sum())
    limit = loop.recipe.training_config.max_memory_gb
    log.info(
        f"{len(loop.steps) - loop.step:,} steps, {tokens:,} tokens, {supervised:,} of them supervised; expected: "
        f"{expected_seconds(model, tokens, supervised):.0f} s, {expected_gb:.1f} GB"
    )
    if recomputed := recomputed_layers(model):
        log.info(f"{recomputed} of {len(decoder_layers(model))} layers are recomputed in the backward pass")
    if limit is not None and expected_gb > limit:
        tokens = loop.largest_batch.tokens
        log.warning(f"max_memory_gb={limit:g} is less than a batch of {tokens:,} tokens takes: lower max_length")
