"""An adapter or a merged model on the Hugging Face Hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.adapter.peft_format import CHAT_FORMAT_FILE, CONFIG_FILE, TENSOR_FILE, read_adapter_config
from phinetune.errors import InputError, PhinetuneError, RunError
from phinetune.hub import hub_answers
from phinetune.model import hub_name
from phinetune.model.files import CONFIG, INDEX
from phinetune.untrusted import TEMPLATES

CARD = "README.md"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
ADAPTER = (CONFIG_FILE, TENSOR_FILE, CHAT_FORMAT_FILE, *TOKENIZER)
SENTENCEPIECE = "tokenizer.model"
MERGED = (CONFIG, "generation_config.json", "model*.safetensors", INDEX, SENTENCEPIECE, *TOKENIZER)


def files_to_publish(folder: Path, merged: bool = False) -> dict[str, bytes | Path]:
    """{name there: what} of what makes an adapter, or a merged model; never data, logs or checkpoints, nor where things
    lie on this machine.

    Raises:
        InputError: if the folder holds none.
    """
    patterns = MERGED if merged else ADAPTER
    is_adapter, is_model = (folder / CONFIG_FILE).is_file(), (folder / CONFIG).is_file()
    if not is_adapter and not is_model:
        raise InputError(str(folder), "holds neither an adapter nor a merged model", "give a run, or what merge wrote")
    if merged == is_adapter:
        what, mend = ("a merged model", "leave --merged out") if merged else ("an adapter", "name it by --merged")
        raise InputError(str(folder), f"is not {what}", mend)
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    files: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in paths}
    if not merged:
        config = read_adapter_config(folder)
        files[CONFIG_FILE] = (json.dumps(_with_public_base(config), indent=2, sort_keys=True) + "\n").encode()
    return files


def _with_public_base(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's configuration with its base as others have it: by its name on the Hub, or a folder's without the
    path to it."""
    base = str(config.get("base_model_name_or_path") or "")
    public = hub_name(base)
    if public == base:
        return config
    return {**config, "base_model_name_or_path": public or Path(base).name, "revision": None}


def check_repository(repository: str) -> None:
    """Raises InputError for a name that the Hub doesn't take."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repository):
        raise InputError(f"repository {repository!r}", "is no name on the Hub", "write owner/name")


def publish(files: Mapping[str, bytes | Path], card: str, repository: str, private: bool, token: str | None) -> str:
    """Uploads files and model card in one commit to a repository, made if it isn't there; returns its address.

    The card isn't written beside the files: a README.md there is somebody's own.

    Raises:
        InputError: without an access token, or where a repository that is to be private is there and public.
        RunError: if the Hub doesn't answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = token or get_token()
    if token is None:
        mend = "set HF_TOKEN to one of yours that may write, or look at the card with --dry-run"
        raise InputError(f"repository {repository}", "nothing can be pushed without an access token", mend)
    if not hub_answers():
        raise RunError(f"repository {repository}", "the Hugging Face Hub does not answer", "try again once connected")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and api.repo_info(repository).private is False:  # it was there, and isn't changed
            what = "is there already, and anybody can read it"
            raise InputError(f"repository {repository}", what, "make it private on the Hub, or name another")
        added = [CommitOperationAdd(name, content) for name, content in {CARD: card.encode(), **files}.items()]
        api.create_commit(repository, added, commit_message="phinetune push")
    except PhinetuneError:
        raise
    except Exception as error:  # the Hub's own kinds, and those of the libraries that talk to it
        what = f"the Hub refuses it, or can't be reached ({' '.join(str(error).split())})"
        raise RunError(f"repository {repository}", what, "look at the connection and the token's rights") from None
    return f"{api.endpoint}/{repository}"
