"""What the command line asks of the libraries it stands on."""


def quiet_libraries() -> None:
    """No bars and warnings of transformers' own between ours; downloads still show theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
