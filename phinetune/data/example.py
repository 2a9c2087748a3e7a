"""What the model is trained on: token ids, and which of them are learnt."""

from dataclasses import dataclass
from typing import Any

import numpy as np

PARTS = ("system", "user", "assistant", "tool", "template")


@dataclass(frozen=True)
class Example:
    """What the model is trained on: `ids` and, for each, whether it is learnt.

    `parts` are the tokens that belong to each of PARTS.  A row is one example, or several.
    """

    where: str
    ids: Any  # (T,) int32
    mask: Any  # (T,) bool
    parts: tuple[int, ...] = (0, 0, 0, 0, 0)

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss: the first token of a row is predicted from nothing."""
        return int(np.count_nonzero(self.mask[1:]))
