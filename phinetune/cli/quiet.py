"""What the command line asks of the libraries it stands on."""

from logging import getLogger


def quiet_libraries() -> None:
    """No bars and warnings of transformers' own between ours; downloads still show theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("bitsandbytes").setLevel("ERROR")  # it says at every import which kernel of the Hub's it does without
