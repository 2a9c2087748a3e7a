"""An adapter or a merged model on the Hugging Face Hub."""

import re
from pathlib import Path

from phinetune.adapter.peft_format import CHAT_FORMAT_FILE, CONFIG_FILE, TENSOR_FILE
from phinetune.errors import InputError, RunError
from phinetune.hub import hub_answers
from phinetune.model.files import CONFIG, INDEX
from phinetune.untrusted import TEMPLATES

CARD = "README.md"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
ADAPTER = (CONFIG_FILE, TENSOR_FILE, CHAT_FORMAT_FILE, *TOKENIZER)
MERGED = (CONFIG, "generation_config.json", "model*.safetensors", INDEX, *TOKENIZER)


def files_to_publish(folder: Path) -> list[Path]:
    """What of a folder makes an adapter, or a merged model; never data, logs or checkpoints.

    Raises:
        InputError: if it is neither.
    """
    for needed, patterns in ((CONFIG_FILE, ADAPTER), (CONFIG, MERGED)):
        if (folder / needed).is_file():
            return sorted({path for pattern in patterns for path in folder.glob(pattern)})
    raise InputError(str(folder), "holds neither an adapter nor a merged model", "give a run, or what merge wrote")


def check_repository(repository: str) -> None:
    """Raises InputError for a name that the Hub doesn't take."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repository):
        raise InputError(f"repository {repository!r}", "is no name on the Hub", "write owner/name")


def publish(folder: Path, files: list[Path], card: str, repository: str, private: bool, token: str | None) -> str:
    """Uploads files and model card in one commit to a repository, made if it isn't there; returns its address.

    The card isn't written beside the files: a README.md there is somebody's own.

    Raises:
        InputError: without an access token.
        RunError: if the Hub doesn't answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = token or get_token()
    if token is None:
        mend = "set HF_TOKEN to one of yours that may write, or look at the card with --dry-run"
        raise InputError(f"repository {repository}", "nothing can be pushed without an access token", mend)
    if not hub_answers():
        raise RunError(f"repository {repository}", "the Hugging Face Hub does not answer", "try again once connected")
    added = {CARD: card.encode(), **{path.relative_to(folder).as_posix(): path for path in files}}
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in added.items()],
            commit_message="phinetune push",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        what = f"the Hub refuses it ({' '.join(str(error).split())})"
        raise RunError(f"repository {repository}", what, "look at the token's rights and the name") from None
    return f"{api.endpoint}/{repository}"
