"""`phinetune chat`"""

import sys
from pathlib import Path
from typing import Any

from phinetune.errors import AdapterError, InputError


def run_chat(
    run: str,
    prompt: str | None,
    system: str | None,
    compare: bool,
    max_new_tokens: int,
    temperature: float,
    allow_mismatch: bool,
) -> None:
    for option, text in (("--prompt", prompt), ("--system", system)):
        _check_text(option, text or "")
    from phinetune import lora
    from phinetune.adapter import is_adapter, recipe_of
    from phinetune.api import load
    from phinetune.cli.quiet import quiet_libraries
    from phinetune.data import Renderer
    from phinetune.generate import stream
    from phinetune.train.estimate import has_room_to_fold

    quiet_libraries()
    if compare and not is_adapter(run):
        raise AdapterError(run, "is no adapter, so there is nothing to compare with its base", "give a run's folder")
    model, tokenizer = load(run, allow_template_mismatch=allow_mismatch)
    if has_room_to_fold(model):
        lora.fuse(model)
    recipe = recipe_of(Path(run)) if is_adapter(run) else None
    renderer = Renderer.of(tokenizer, recipe.data if recipe else None)

    def answer(messages: list[dict[str, Any]]) -> str:
        said = stream(model, tokenizer, messages, max_new_tokens, temperature, _write, renderer)
        print()
        return said

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for said in [prompt] if prompt is not None else _asked():
        messages.append({"role": "user", "content": said})
        if compare:
            _write("base   ")
            with lora.disabled(model):
                answer(messages)
            _write("tuned  ")
        messages.append({"role": "assistant", "content": answer(messages)})


def _asked() -> Any:
    """What the user types, until Ctrl-D or Ctrl-C; empty lines say nothing."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():
        print("Ctrl-D ends the chat.")
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise InputError("stdin", f"is not UTF-8 ({error.reason})", "write in UTF-8") from None
        _check_text("stdin", said)
        if said:
            yield said


def _check_text(where: str, text: str) -> None:
    """Raises InputError for bytes that were no text, which Python keeps as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(where, "is not UTF-8", "write in UTF-8") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
