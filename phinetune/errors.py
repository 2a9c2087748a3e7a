"""The exception tree: everything phinetune raises on purpose derives from `PhinetuneError`.

`InputError` and its kinds are for what the user gave (exit code 2); `RunError` is for what went
wrong at run time (exit code 1).  Each carries one message of the form `WHERE: WHAT; HOW TO MEND`.
"""

from typing import Any


class PhinetuneError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, where: str, what: str, mend: str = "") -> None:
        self.where, self.what, self.mend = where, what, mend
        super().__init__(f"{where}: {what}" + (f"; {mend}" if mend else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes as they are, whatever their kind is made from."""
        return _again, (type(self), str(self), self.__dict__)


class InputError(PhinetuneError, ValueError):
    """What the user gave can't be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, an override or a configuration dictionary is wrong."""


class DataError(InputError):
    """The data can't be read, or too much of it is unusable."""


class ModelError(InputError):
    """The model or tokenizer can't be had, or isn't of a kind that can be tuned."""


class AdapterError(InputError):
    """An adapter folder is missing, damaged, or doesn't fit the model."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class RunError(PhinetuneError):
    """A run failed at run time."""


class Stopped(PhinetuneError):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, where: str, what: str, mend: str, signal_number: int) -> None:
        super().__init__(where, what, mend)
        self.exit_code = 128 + signal_number


def _again(kind: type[PhinetuneError], message: str, attributes: dict[str, Any]) -> PhinetuneError:
    error = kind.__new__(kind, message)
    error.__dict__.update(attributes)
    return error
