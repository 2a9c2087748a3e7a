"""Whether the Hugging Face Hub can be reached, known within seconds."""

import functools
import os
import socket
import threading
import time
from urllib.parse import urlsplit

HUB_ANSWERS_WITHIN = 3.0  # seconds
KNOWN_FOR = 60.0  # seconds


def hub_answers() -> bool:
    """Whether the Hub can be reached, known within seconds; a proxy is trusted to reach it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(constants.ENDPOINT)
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    return _answers(address, int(time.monotonic() / KNOWN_FOR))


@functools.lru_cache(maxsize=1)
def _answers(address: tuple[str, int], minute: int) -> bool:
    answered = threading.Event()

    def knock() -> None:  # in a thread: a name server that is silent has no time limit of its own
        try:
            socket.create_connection(address, timeout=HUB_ANSWERS_WITHIN).close()
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(HUB_ANSWERS_WITHIN)
    return answered.is_set()
