"""Every part of a run tried once, with the longest rows, before the first step: what would fail in an hour fails now.

    step          the longest rows, as many tokens as a step has in a flat batch: forward, backward, optimiser at
                  learning rate 0
    evaluation    the longest held-out rows; answers of a few tokens to the longest prompts
    checkpoint    written, read back, removed
    merge         one layer

Nothing stays of it: what trains keeps its bits, and AdamW's moments are forgotten, or a resumed run's read again.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from phinetune.data import Example, Prepared, Renderer
from phinetune.evaluate import evaluate_loss, measure
from phinetune.generate import answers
from phinetune.lora import fused, lora_layers
from phinetune.train.checkpoint import load_checkpoint, prove, save_checkpoint
from phinetune.train.estimate import has_room_to_fold
from phinetune.train.loop import Loop
from phinetune.train.progress import Progress

log = logging.getLogger(__name__)

NEW_TOKENS = 2  # of each answer
PROMPTS_LOOKED_AT = 1000
FOLDER = ".tmp-checkpoint-rehearsal"  # called so that the next run removes what a killed one leaves


def rehearse(loop: Loop, tokenizer: Any, data: Prepared, progress: Progress | None = None) -> None:
    """Tries all of it, and leaves nothing behind.

    Args:
        progress: from which `loop` goes on.

    Raises:
        RunError: as the run itself would: a row that doesn't fit into memory, a loss that isn't finite, a full disk.
    """
    begin, done = time.perf_counter(), ["step"]
    rows = longest_rows(data.train, min(loop.largest_batch.tokens, loop.max_batch_tokens))
    loop.model.train()
    loop.update(rows, learning_rate=0.0)
    if data.eval:
        evaluate_loss(loop.model, longest_rows(data.eval, loop.max_batch_tokens), loop.max_batch_tokens)
        done.append("evaluation")
        if loop.recipe.evaluation.metrics:
            _answer(loop, tokenizer, data)
            done.append("answers")
    with loop.signals.deferred():  # what is written is removed, whatever comes meanwhile
        _write_and_read(loop)
    loop.signals.check()
    _merge(loop.model)
    loop.optimizer.state.clear()
    if progress is not None:
        load_checkpoint(progress.checkpoint, loop.model, loop.optimizer)
    tokens = sum(len(row.ids) for row in rows)
    log.info(
        f"rehearsal: {', '.join([*done, 'checkpoint', 'merge'])} with the longest rows ({tokens:,} tokens in "
        f"{len(rows)}): {time.perf_counter() - begin:.1f} s"
    )


def longest_rows(examples: Any, tokens: int) -> Sequence[Example]:
    """As long rows as `tokens` tokens hold together, and the longest in any case: those of the largest flat batch."""
    lengths = np.asarray(examples.lengths)
    chosen: list[int] = []
    left, shortest = tokens, int(lengths.min())
    for place in np.argsort(-lengths, kind="stable").tolist():
        if not chosen or lengths[place] <= left:
            chosen.append(place)
            left -= int(lengths[place])
        if left < shortest:
            break
    return [examples[place] for place in chosen]


def _answer(loop: Loop, tokenizer: Any, data: Prepared) -> None:
    renderer = Renderer.of(tokenizer, loop.recipe.data)
    turns = [turn for row in data.eval_rows[:PROMPTS_LOOKED_AT] if (turn := renderer.last_answer(row))]
    turns = sorted(turns, key=lambda turn: len(turn.prompt_ids), reverse=True)
    size = loop.recipe.training_config.per_device_eval_batch_size
    loop.model.eval()
    with fused(loop.model) if has_room_to_fold(loop.model) else nullcontext():
        prompts = [turn.prompt_ids for turn in turns[:size]]
        said = answers(loop.model, tokenizer, prompts, NEW_TOKENS, size, sampling=loop.recipe.evaluation.sampling)
    loop.model.train()
    for metric in loop.recipe.evaluation.metrics if said else ():
        measure(metric, said, said, [turn.expected for turn in turns[:size]])


def _write_and_read(loop: Loop) -> None:
    folder = loop.folder / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        checkpoint = save_checkpoint(folder, 0, loop.model, loop.optimizer, {"identity": {}}, loop.base, None)
        prove(checkpoint)
        load_checkpoint(checkpoint, loop.model, loop.optimizer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _merge(model: Any) -> None:
    """The largest adapted layer; all at once take the memory of a second model."""
    layer = max(
        (layer for _, layer in lora_layers(model)), key=lambda layer: sum(p.numel() for p in layer.parameters())
    )
    was_training = layer.training
    layer.eval()
    layer.merge()
    layer.unmerge()
    layer.train(was_training)
