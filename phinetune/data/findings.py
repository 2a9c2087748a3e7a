"""What is worth knowing about a row that is used all the same, and in which words it is said."""

from enum import IntFlag, auto


class Finding(IntFlag):
    """Bits, so that millions of rows can be kept as numbers."""

    CONTROL_TEXT = auto()
    REWRITTEN = auto()
    NOT_LEARNT = auto()
    TRUNCATED = auto()
    WITHOUT_END = auto()
    SPLIT = auto()
    UNANSWERED = auto()
    SYSTEM_MOVED = auto()
    SYSTEM_IGNORED = auto()
    EMPTY_SYSTEM = auto()
    ENDLESS = auto()
    UNWRITABLE = auto()
    ROLE_ORDER = auto()
    EMPTY_TURN = auto()
    DUPLICATE = auto()
    HELD_OUT = auto()

    @property
    def words(self) -> str:
        return WORDS[self]


WORDS = {
    Finding.CONTROL_TEXT: "spell a control token, which stays text",
    Finding.REWRITTEN: "have turns that the template rewrites later: these are examples of their own",
    Finding.NOT_LEARNT: "have turns that the template rewrites later: these are not learnt",
    Finding.TRUNCATED: "were too long and are cut behind a turn",
    Finding.WITHOUT_END: "were too long and are cut inside an answer: its end of turn is not learnt",
    Finding.SPLIT: "were too long and are made into several examples",
    Finding.UNANSWERED: "end without an answer",
    Finding.SYSTEM_MOVED: "have a system message that the template doesn't write: it stands in front of the question",
    Finding.SYSTEM_IGNORED: "have a system message that the template doesn't write: it is left out",
    Finding.EMPTY_SYSTEM: "have an empty system message",
    Finding.ENDLESS: "have an answer behind which the template writes no control token: its end is not learnt",
    Finding.UNWRITABLE: "hold characters that the tokenizer can't write: they are lost",
    Finding.ROLE_ORDER: "have turns that don't alternate, or begin with the assistant",
    Finding.EMPTY_TURN: "have an empty turn",
    Finding.DUPLICATE: "stand in the data before",
    Finding.HELD_OUT: "are held-out rows too",
}
NOTHING = Finding(0)
