"""From text to token ids, as the tokenizer gives them, and from a character to its token.

Two things are ours.

Words are remembered.  Byte pairs never merge across a space (no token of the vocabulary holds one behind another
character), so a text's ids are those of its words, and most words have been seen before: some four times as fast as
the tokenizer itself on English.  It is used where the vocabulary, the pre-tokenizer and a trial say that it is exact.

Control tokens inside a message stay text.  A message that spells <|end|> must not end a turn.  The text is encoded by
a copy of the tokenizer in which control tokens have other names; the template's own are renamed, the message's aren't.
"""

import bisect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

# What tokenizers (Rust) calls white space.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
REMEMBERED_WORDS = 200_000
LONGEST_REMEMBERED = 64  # characters
TRIAL = (
    "Hello world, it's  a   trial.\n\n  Indented\tline\r\n\r\nend. 12345 3.14 foo_bar(x) => {y: [1, 2]};  "
    " leading and trailing   \n",
    "Kumusta ka? Ñandú naïve café É e\u0301 漢字 かな 한국어 العربية हिन्दी 😀👩‍👩‍👧 \u200bzero \u00a0nbsp \u3000wide",
    "a b  c\n d \n e\t f ' s 's 'll DON'T I'm x' y \u2019s  \u1680 x \x1c y \x0b z\x85w",
    ' 1 22 333 4444 1,000,000 -5 +6 $7 8% #9 @a /b \\c |d ~e `f` "g" (h) [i] {j} <k> <|l|> m|> </n>',
)


@dataclass(frozen=True)
class Encoded:
    """`ids` of a text; `token_at(c)` is the number of tokens that begin before character c."""

    ids: Any  # (T,) integers
    token_at: Callable[[int], int]


class Encoder:
    """A fast tokenizer as a function from text to ids, without the special tokens it might add.

    Args:
        tokenizer: its tokenizer.json, as text.
        words: whether words are remembered; what it gives is the same either way.
    """

    def __init__(self, tokenizer: str, words: bool = True) -> None:
        self.json = tokenizer
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.added = {token.content: (id, token) for id, token in self.tokenizer.get_added_tokens_decoder().items()}
        tree = json.loads(tokenizer)  # parsed once (0.05 s and more), and not kept, for it is large
        self._unk = self._id_of(tree["model"].get("unk_token"))
        self._missing_bytes = self._bytes_without_token(tree["pre_tokenizer"])
        self._words = _Words(self) if words else None
        if self._words is not None and not self._words.agree(tree):
            self._words = None

    @classmethod
    def of(cls, tokenizer: Any) -> "Encoder":
        """That of a transformers tokenizer."""
        return cls.shared(tokenizer_json(tokenizer))

    @staticmethod
    @lru_cache(maxsize=4)
    def shared(tokenizer: str) -> "Encoder":
        """One encoder for all who have the same tokenizer: making it takes some tenths of a second."""
        return Encoder(tokenizer)

    @property
    def remembers_words(self) -> bool:
        return self._words is not None

    def encode(self, text: str) -> Encoded:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        if self._words is not None:
            return self._words.encode_batch(texts)
        return [self.direct(text) for text in texts]

    def direct(self, text: str) -> Encoded:
        """By the tokenizer itself."""
        return _from_offsets(self.tokenizer.encode(text, add_special_tokens=False))

    def loses(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the tokenizer has no token for some character of a text, and leaves it out or writes `unk`."""
        return self._unk in ids or len(text.encode().translate(None, self._missing_bytes)) < len(text.encode())

    def _id_of(self, unk: Any) -> int:
        id = self.tokenizer.token_to_id(unk) if isinstance(unk, str) else None
        return -1 if id is None else id

    def _bytes_without_token(self, pre_tokenizer: Any) -> bytes:
        """Bytes that a byte-level vocabulary lacks; none in others."""
        if not any(part["type"] == "ByteLevel" for part in _flat(pre_tokenizer, "pretokenizers")):
            return b""
        letters = ByteLevel.alphabet()
        held = [letter for letter in letters if self.tokenizer.token_to_id(letter) is None]
        return bytes(_byte_of(letter) for letter in held)

    def encode_with_text(self, text: str, places: Sequence[tuple[int, int]]) -> Encoded:
        """Ids of a text in which the control tokens at `places` (begin, end) are words and nothing more.

        Raises:
            ValueError: if this tokenizer takes them for control tokens all the same.
        """
        pieces: list[tuple[int, str]] = []  # (where it begins in text, what is encoded)
        at = 0
        control = control_pattern(self.added)
        for begin, end in [*places, (len(text), len(text))]:
            for match in control.finditer(text, at, begin):
                pieces += [(at, text[at : match.start()]), (match.start(), self._aliases[match.group()])]
                at = match.end()
            pieces.append((at, text[at:end]))
            at = end
        encoded = _from_offsets(self._renamed.encode("".join(piece for _, piece in pieces), add_special_tokens=False))
        # Characters of the text, as characters of what was encoded.
        texts = [begin for begin, _ in pieces]
        encodeds = [0, *accumulate(len(piece) for _, piece in pieces)]

        def token_at(char: int) -> int:
            piece = max(bisect.bisect_right(texts, char) - 1, 0)
            return encoded.token_at(min(encodeds[piece] + char - texts[piece], encodeds[piece + 1]))

        wanted = sum(1 for _, piece in pieces if piece in self._alias_names)
        controls = {id for id, _ in self.added.values()}
        if sum(1 for id in encoded.ids if id in controls) != wanted:
            raise ValueError("this tokenizer takes them for real ones")
        return Encoded(encoded.ids, token_at)

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {content: f"\U0010fffd{id:x}\U0010fffc" for content, (id, _) in self.added.items()}

    @cached_property
    def _alias_names(self) -> frozenset[str]:
        return frozenset(self._aliases.values())

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer with its added tokens under names that no text holds."""
        tree = json.loads(self.json)
        for token in tree["added_tokens"]:
            token["content"] = self._aliases[token["content"]]
        vocabulary = tree["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tree["model"]["vocab"] = {self._aliases.get(token, token): id for token, id in vocabulary.items()}
        else:  # Unigram: [token, score]
            tree["model"]["vocab"] = [[self._aliases.get(token, token), score] for token, score in vocabulary]
        if tree["model"].get("unk_token") in self._aliases:
            tree["model"]["unk_token"] = self._aliases[tree["model"]["unk_token"]]
        tree |= {"post_processor": None, "truncation": None, "padding": None}
        renamed = Tokenizer.from_str(json.dumps(tree))
        moved = [
            content for content, (id, _) in self.added.items() if renamed.token_to_id(self._aliases[content]) != id
        ]
        if moved:
            raise ValueError(f"this tokenizer can't do without the token {moved[0]}")
        return renamed


def tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer.json of a transformers tokenizer, without what an earlier call may have set."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return str(backend.to_str())


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds these tokens, the longest first, as a tokenizer does; white space is never a control token."""
    found = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) if found else r"(?!)")


def _from_offsets(encoding: Any) -> Encoded:
    begins: list[int] = []

    def token_at(char: int) -> int:
        if not begins:
            begins.extend(begin for begin, _ in encoding.offsets)
        return bisect.bisect_left(begins, char)

    return Encoded(encoding.ids, token_at)


class _Words:
    """A text's ids from those of its words: pieces that begin where a space follows another character."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.known: dict[str, bytes] = {}  # int32 ids
        self.known_first: dict[str, bytes] = {}  # of words at the beginning of a text
        self.cuts_headers = False
        tokens = encoder.added
        self.ids = {content: id for content, (id, _) in tokens.items()}
        self.id_bytes = {content: np.int32(id).tobytes() for content, id in self.ids.items()}
        self.strips = {content for content, (_, token) in tokens.items() if token.rstrip}
        found = sorted(tokens, key=len, reverse=True)
        self.control = re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else re.compile("((?!))")
        # Behind it a piece is encoded as in the middle of a text.
        self.anchor = next((c for c, (_, t) in tokens.items() if not t.rstrip and not t.lstrip), "")

    def agree(self, tree: dict[str, Any]) -> bool:
        """Whether words are all there is to this tokenizer (`tree`): its parts are known ones, and a trial holds."""
        model = tree["model"]
        if model.get("type") != "BPE" or model.get("dropout") or not self.anchor:
            return False
        if any(token.lstrip or token.single_word for _, token in self.encoder.added.values()):
            return False
        normalizers = _flat(tree["normalizer"], "normalizers")
        if any(part["type"] != "NFC" for part in normalizers):
            return False
        if normalizers and any(token.normalized for _, token in self.encoder.added.values()):
            return False
        parts = _flat(tree["pre_tokenizer"], "pretokenizers")
        kinds = [part["type"] for part in parts]
        if kinds == ["Metaspace"]:
            space, known = "▁", not parts[0].get("split") and parts[0]["prepend_scheme"] == "first"
        else:
            space, known = "Ġ", "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Split", "Digits"}
            known = known and not any(part.get("add_prefix_space") for part in parts)
        white = "▁" if space == "▁" else "ĠĊĉčċČ"
        across = re.compile(f"[^{white}]{space}")
        vocabulary = [token for token in model["vocab"] if token not in self.ids]
        if not known or any(across.search(token) for token in vocabulary):
            return False
        line = "\n" if space == "▁" else "Ċ"
        over_lines = re.compile(f"[0-9A-Za-z]{line}|{line}[^{white}{line}]")
        self.cuts_headers = not any(over_lines.search(token) for token in vocabulary)
        anchored = [self.anchor.join([text, text[::-1], ""]) for text in TRIAL]
        trials = [*TRIAL, *anchored, *(control + text for text in TRIAL for control in list(self.ids)[:8])]
        return all(self._same(text, got) for text, got in zip(trials, self.encode_batch(trials), strict=True))

    def _same(self, text: str, got: Encoded) -> bool:
        true = self.encoder.direct(text)
        places = range(0, len(text) + 1, 3)
        return list(got.ids) == list(true.ids) and all(got.token_at(char) == true.token_at(char) for char in places)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        if len(self.known) > REMEMBERED_WORDS:
            self.known.clear()
        split = [self._split(text) for text in texts]
        found = {word for segments in split for segment in segments for word in segment.words}
        unknown = found.difference(self.known)  # not `-`, which would walk through all that is known
        self.known |= self._encode(list(unknown))
        ids = {word: self.known[word] for word in found}  # small enough to stay in the processor's cache
        encoded = [self._join(segments, ids) for segments in split]
        for word in unknown:
            if len(word) > LONGEST_REMEMBERED:
                del self.known[word]
        return encoded

    def _split(self, text: str) -> list["_Segment"]:
        segments = []
        at, control = 0, ""
        pieces = self.control.split(text)
        for index in range(0, len(pieces), 2):
            if index:
                control = pieces[index - 1]
                at += len(control)
            piece = pieces[index]
            stripped = piece.lstrip(SPACE) if control in self.strips else piece
            begin, at = at + len(piece) - len(stripped), at + len(piece)
            segments.append(_Segment(control, begin, at, self._words_of(stripped) if stripped else []))
        return segments

    def _words_of(self, text: str) -> list[str]:
        """A text cut where a space follows another character, and behind a first line that is a template's header."""
        line = text.find("\n", 1, LONGEST_REMEMBERED) if self.cuts_headers else -1
        if line > 0 and _header.match(text, line - 1):
            return [*_words_of.findall(text[: line + 1]), *_words_of.findall(text[line + 1 :])]
        return _words_of.findall(text)

    def _encode(self, words: list[str]) -> dict[str, bytes]:
        """Ids of words in the middle of a text: all in one go, an anchor before each."""
        if not words:
            return {}
        joined = self.anchor + self.anchor.join(words)
        (encoding,) = self.tokenizer.encode_batch_fast([joined], add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        ends = np.append((ids == self.ids[self.anchor]).nonzero()[0], len(ids)) * ids.itemsize
        begins, ends, of_all = (ends[:-1] + ids.itemsize).tolist(), ends[1:].tolist(), ids.tobytes()
        return {word: of_all[begin:end] for word, begin, end in zip(words, begins, ends, strict=True)}

    def _join(self, segments: list["_Segment"], ids: Mapping[str, bytes]) -> Encoded:
        pieces: list[bytes] = []
        tokens = [0]  # before each segment's words, and behind them
        for segment in segments:
            own = [ids[word] for word in segment.words]
            if own and segment.is_first:
                own[0] = self._first(segment.words[0])
            joined = b"".join(own)
            head = self.id_bytes[segment.control] if segment.control else b""
            pieces += (head, joined)
            tokens += (tokens[-1] + len(head) // 4, tokens[-1] + (len(head) + len(joined)) // 4)
        begins = [segment.begin for segment in segments]

        def token_at(char: int) -> int:
            at = bisect.bisect_left(begins, char) - 1
            if at < 0:
                return 0
            segment = segments[at]
            if char >= segment.end:  # at the next control token, or inside it, or in white space that it takes along
                return tokens[2 * at + 2] + (1 if at + 1 < len(segments) and char > segment.end else 0)
            token, begin = tokens[2 * at + 1], segment.begin
            for number, word in enumerate(segment.words):
                if char <= begin:
                    break
                is_first = number == 0 and segment.is_first
                if char < begin + len(word):
                    anchor = "" if is_first else self.anchor
                    inside = self.encoder.direct(anchor + word)
                    return token + inside.token_at(len(anchor) + char - begin) - (1 if anchor else 0)
                token += len(self._first(word) if is_first else self._ids(word)) // 4
                begin += len(word)
            return token

        return Encoded(np.frombuffer(b"".join(pieces), np.int32), token_at)

    def _first(self, word: str) -> bytes:
        """Ids of a word at the very beginning of a text."""
        if word not in self.known_first:
            if len(self.known_first) > 1000:
                self.known_first.clear()
            ids = self.tokenizer.encode(word, add_special_tokens=False).ids
            self.known_first[word] = np.array(ids, np.int32).tobytes()
        return self.known_first[word]

    def _ids(self, word: str) -> bytes:
        """Ids of a word that may have been forgotten since."""
        return self.known[word] if word in self.known else self._encode([word])[word]


@dataclass(frozen=True, slots=True)
class _Segment:
    """The words between two control tokens: the one in front, the characters they stand at."""

    control: str
    begin: int
    end: int
    words: list[str]

    @property
    def is_first(self) -> bool:
        return self.begin == 0 and not self.control


def _byte_of(letter: str) -> int:
    """The byte that a byte-level vocabulary writes as this letter: itself if it can be printed, else from Ā on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return ord(letter) if ord(letter) in printed else others[ord(letter) - 0x100]


_header = re.compile(r"[0-9A-Za-z]\n(?=\S)")
# Cuts before every space that follows a character which is no white space.
_words_of = re.compile(r"\s*+\S++(?:[^\S ]\s*+\S++)*+(?:[^\S ]\s*+)?+|\s++")


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [found for inner in part[key] for found in _flat(inner, key)] if part["type"] == "Sequence" else [part]
