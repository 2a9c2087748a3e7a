"""Answers from a model: batched for evaluation, streamed for a person."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from phinetune.data import Renderer
from phinetune.errors import RunError
from phinetune.kernels.allocator import is_out_of_memory
from phinetune.kernels.linear import linear
from phinetune.kernels.pieces import release_idle
from phinetune.model import has_position_table, long_rope_boundary, stop_ids

log = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

# Greedy means greedy, whatever the model's own generation config adds.
GREEDY: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
MIN_SHARED_PREFIX = 16  # tokens: below this, a prompt's common beginning isn't worth a pass of its own


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
    sampling: Mapping[str, Any] = GREEDY,
    seed: int = 0,
) -> list[str]:
    """Answers to prompts (`Renderer.prompt_ids`), in their order.

    Prompts of similar length are answered together, and a beginning that all of a batch share (the system
    message) is computed once.  `on_progress` is told how many more are done.

    Args:
        sampling: `EvaluationConfig.sampling`, by the names of GenerationConfig.
        seed: of what is drawn; torch's own generator is left as it was.
    """
    release_idle()  # what a step's activations left is no use here
    stops = stop_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    room = _room(model, [*map(len, prompts)], max_new_tokens)
    boundary = long_rope_boundary(model.config)
    longer = sum(boundary is not None and len(prompt) + max_new_tokens > boundary for prompt in prompts)
    groups = [order[:longer], order[longer:]]  # what needs other factors is never answered together
    if sampling["repetition_penalty"] != 1 or sampling["no_repeat_ngram_size"]:  # padding would count as said before
        groups = [[*alike] for _, alike in itertools.groupby(order, key=lambda i: len(prompts[i]))]
    if min(room, default=max_new_tokens) < max_new_tokens:  # each of these by itself
        groups = [[i] for i in order if room[i] < max_new_tokens] + [
            [i for i in group if room[i] == max_new_tokens] for group in groups
        ]
    settings = {**sampling, "eos_token_id": stops, "pad_token_id": stops[0]}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for chunk in [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]:
            asked = {**settings, "max_new_tokens": min(room[i] for i in chunk)}
            said = _in_memory(model, [prompts[i] for i in chunk], asked)
            for i, ids in zip(chunk, said, strict=True):
                texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
            on_progress(len(chunk))
    return texts


def _room(model: Any, prompts: Sequence[int], max_new_tokens: int) -> list[int]:
    """How many tokens may follow prompts of so many each; says where they are fewer, or a prompt is longer than the
    model was made for.

    Raises:
        RunError: where it can't be given a prompt at all.
    """
    positions, longest = getattr(model.config, "max_position_embeddings", None), max(prompts, default=0)
    if positions is None or longest + max_new_tokens <= positions:
        return [max_new_tokens] * len(prompts)
    what = f"the model was made for {positions:,} positions, and a prompt has {longest:,} tokens"
    if not has_position_table(model):
        if longest >= positions:
            log.warning(f"{what}: it answers badly where it never was")
        return [max_new_tokens] * len(prompts)
    if longest >= positions:
        raise RunError("answers", what, "give shorter ones")
    log.warning(f"{what}: its answer ends after {positions - longest:,}")
    return [min(max_new_tokens, positions - prompt) for prompt in prompts]


def _in_memory(model: Any, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[list[int]]:
    """`_generate`, of half the prompts at a time once memory is refused."""
    try:
        return _generate(model, prompts, settings)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    half = len(prompts) // 2
    log.warning(f"answers: memory was refused for {len(prompts)} prompts at once: going on with {half}")
    parts = prompts[:half], prompts[half:]
    return [ids for part in parts for ids in _in_memory(model, part, settings)]


def _generate(model: Any, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[list[int]]:
    """New ids of each prompt, without the token that ended it.

    Prompts are padded behind their shared beginning, so that its keys and values serve all of them:

        ids   [ s s s _ a a ]      mask  [ 1 1 1 0 1 1 ]      s: shared, computed once
              [ s s s b b b ]            [ 1 1 1 1 1 1 ]
    """
    width, stops, pad = max(map(len, prompts)), settings["eos_token_id"], settings["pad_token_id"]
    window = getattr(model.config, "sliding_window", None)
    # Padding in the middle would take places in a sliding window; a state can't be repeated.
    is_alone = (window and width + settings["max_new_tokens"] > window) or getattr(model, "_is_stateful", False)
    shared = 0 if is_alone else _shared_prefix(prompts)
    ids = torch.tensor([p[:shared] + [pad] * (width - len(p)) + p[shared:] for p in prompts], device=model.device)
    mask = torch.tensor(
        [[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in prompts], device=model.device
    )
    cache = None
    if shared and len(prompts) > 1:
        cache = model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    with _own_head(model):
        out: Tensor = model.generate(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **settings)
    rows = out[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


@contextmanager
def _own_head(model: Any) -> Iterator[None]:
    """The head by phinetune's products, of a copy of the last position of each prompt: of a slice of a batch torch
    multiplies row by row on a CPU, with a copy of the head's weight for each (52 prompts of SmolLM2: 2.9 GB and 5 s;
    torch 2.13)."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    replaced = vars(head).get("forward")  # accelerate's, say
    is_plain = type(head) is nn.Linear and replaced is None
    forward = head.forward

    def of_rows_together(x: Tensor, *more: Any) -> Tensor:
        x = x.contiguous()
        if not is_plain:
            return cast(Tensor, forward(x, *more))
        y: Tensor = linear(x.flatten(0, -2), head.weight, head.bias)
        return y.view(*x.shape[:-1], -1)

    head.forward = of_rows_together
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own; 0 where too few."""
    shared = 0
    for column in zip(*(prompt[:-1] for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared if shared >= MIN_SHARED_PREFIX else 0


@torch.inference_mode()
def stream(
    model: Any,
    tokenizer: Any,
    messages: Messages,
    max_new_tokens: int,
    temperature: float = 0.0,
    write: Callable[[str], None] = lambda text: None,
    renderer: Renderer | None = None,
) -> str:
    """One answer, handed to `write` piece by piece as it grows; greedy at temperature 0."""
    renderer, pieces = renderer or Renderer.of(tokenizer), _Pieces(tokenizer, write)
    ids = torch.tensor([renderer.prompt_ids(messages)])
    (max_new_tokens,) = _room(model, [ids.shape[1]], max_new_tokens)
    stops = stop_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else GREEDY
    with _own_head(model):
        model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=stops,
            pad_token_id=stops[0],
            streamer=pieces,
            **sampling,
        )
    return pieces.text


class _Pieces:
    """What `generate` is given as a streamer. transformers' own begins anew at each line, and so loses a space of each
    with tokenizers that leave out the first one, as Phi-3's does."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._write = tokenizer, write
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown, self._is_prompt, self.text = "", True, ""

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._ids.append(token)
            try:
                piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
            except Exception:  # of bytes that are no text, which later ones change: the end has it right
                continue
            self._shown += piece
            self._write(piece)

    def end(self) -> None:
        """The whole as it is without streaming; what was held back, half a character say, is written."""
        self.text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._write(self.text.removeprefix(self._shown) if self.text.startswith(self._shown) else "")
