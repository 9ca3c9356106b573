"""Text as token ids and token ids as text, whole characters only, by any object that has `encode` and `decode`."""

import codecs
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mamba_core.sampling import integer
from mamba_core.weights.formats import boundary, read_input

# Of the prompt's tokens, how many are decoded together with what follows them.
CONTEXT = 8
# What a text is put behind to see its tokens without a space before them.
STARTS = ("\n", ".")
# A character has up to four bytes, each of which may be a token.
BYTES = 4
# The most tokens without text that are decoded together.
LONGEST = 32
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What tokenizers shorten when they clean up spaces.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

# From a token to the text that is complete with it; None gives what is left.
Decode = Callable[[int | None], str]
DecodeAll = Callable[[Sequence[int]], str]


class Tokenizer(Protocol):
    """What this package uses."""

    def encode(self, text: str) -> list[int]:
        """A text from its beginning, with the tokens that stand there."""

    def encode_rendered(self, text: str) -> list[int]:
        """A text that has its special tokens written out, such as that of a chat template."""

    def encode_more(self, text: str) -> list[int]:
        """A text that goes on from another one."""

    def decoder(self, context: Sequence[int] = ()) -> Decode:
        """Text of the tokens that come after those of the context."""


class ByteTokenizer:
    """Text as its UTF-8 bytes: token i is byte i."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_rendered = encode_more = encode

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def decoder(self, context: Sequence[int] = ()) -> Decode:
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Of the context only the bytes of a character that is not complete tell.
        incremental.decode(bytes(token for token in context[-BYTES:] if token < 256))

        def decode(token: int | None) -> str:
            if token is None:
                return incremental.decode(b"", final=True)
            return incremental.decode(bytes([token])) if token < 256 else ""

        return decode


class AnyTokenizer:
    """A tokenizer of another package: transformers', `tokenizers`', sentencepiece's, tiktoken's, or one like them.

    Raises:
        TypeError: it has no `encode` and `decode`.
    """

    def __init__(self, tokenizer: Any):
        if not all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
            kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
            raise TypeError(f"tokenizer is {kind}; expected an object with encode(text) and decode(ids)")
        self.tokenizer = tokenizer
        settings, told = _parameters(tokenizer.encode), _parameters(tokenizer.decode)
        # How each package leaves out the tokens at the beginning, and takes those that are written out.
        self._plain = {
            name: value
            for name, value in (("add_special_tokens", False), ("add_bos", False), ("add_eos", False))
            if name in settings
        }
        self._rendered = self._plain | ({"allowed_special": "all"} if "allowed_special" in settings else {})
        self._skipping = {"skip_special_tokens": True} if "skip_special_tokens" in told else {}
        any_setting = any(item.kind is item.VAR_KEYWORD for item in told.values())
        cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False) is True
        self._cleans = cleans and (any_setting or "clean_up_tokenization_spaces" in told)

    def encode(self, text: str) -> list[int]:
        return ids_of(self.tokenizer.encode(text))

    def encode_rendered(self, text: str) -> list[int]:
        """Special tokens are not added again.

        Raises:
            ValueError: the tokenizer would take a special token that is written out for text.
        """
        if callable(control := getattr(self.tokenizer, "IsControl", None)):  # sentencepiece's
            pieces = [self.tokenizer.IdToPiece(token) for token in range(len(self.tokenizer)) if control(token)]
            if found := [piece for piece in pieces if piece in text]:
                raise ValueError(
                    f"the tokenizer takes {found[0]!r}, which the chat template writes, for plain text; "
                    "pass one that knows special tokens, such as that of a tokenizer.json"
                )
        return ids_of(self.tokenizer.encode(text, **self._rendered))

    def encode_more(self, text: str) -> list[int]:
        """Without the tokens at the beginning of a text, and without the space that some tokenizers put there."""
        plain = ids_of(self.tokenizer.encode(text, **self._plain))
        for start in STARTS if self._prepends else ():
            before = ids_of(self.tokenizer.encode(start, **self._plain))
            whole = ids_of(self.tokenizer.encode(start + text, **self._plain))
            if before and whole[: len(before)] == before and self.decode(whole) == self.decode(before) + text:
                return whole[len(before) :]
        return plain

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens; special tokens are left out where the tokenizer knows how."""
        if not ids:
            return ""
        try:
            return self.tokenizer.decode(list(ids), **self._skipping)
        except (IndexError, KeyError, OverflowError):
            known = [token for token in ids if self._knows(token)]
            return self.tokenizer.decode(known, **self._skipping) if known else ""

    def decoder(self, context: Sequence[int] = ()) -> Decode:
        return _Decoder(self.decode, context, self._decode_raw if self._cleans else None)

    def _decode_raw(self, ids: Sequence[int]) -> str:
        """Without cleaning up spaces."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, **self._skipping)

    @cached_property
    def _prepends(self) -> bool:
        """Whether a space is put before a text."""
        letter = ids_of(self.tokenizer.encode("a", **self._plain))
        return " " in self.decode([*letter, *letter])

    def _knows(self, token: int) -> bool:
        """A model may have more entries than its tokenizer; some tokenizers fail at those."""
        try:
            self.tokenizer.decode([token], **self._skipping)
        except (IndexError, KeyError, OverflowError):
            return False
        return True


class SubwordTokenizer(AnyTokenizer):
    """A `tokenizers.Tokenizer` from a tokenizer.json.

    Raises:
        CheckpointError: there is no such file, it is no tokenizer, or `tokenizers` fails with it, also when it is used.
        ImportError: `tokenizers` is not installed.
    """

    def __init__(self, path: Path | str):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ImportError("reading tokenizer.json needs tokenizers; pip install 'mamba_core[hub]'") from None
        self._where = f"{path}: not a tokenizer that can be used"
        with boundary(path):
            data = read_input(path)
        with boundary(self._where):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
            tokenizer.no_truncation()  # the file may have that of somebody's training
        super().__init__(tokenizer)

    # A file that is read may still end in a fault, or a panic, when it is used.

    def encode(self, text: str) -> list[int]:
        with boundary(self._where):
            return super().encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        with boundary(self._where):
            return super().encode_rendered(text)

    def encode_more(self, text: str) -> list[int]:
        with boundary(self._where):
            return super().encode_more(text)

    def decode(self, ids: Sequence[int]) -> str:
        with boundary(self._where):
            return super().decode(ids)


class _Decoder:
    """Decodes tokens together with those before them, and gives what cannot change any more.

    Two decodes are compared: of tokens whose text has been given, and of the same with those that came since. So a
    space that is stripped at the beginning of a text, or a character in several tokens, is as in a decode of the whole.
    """

    def __init__(self, decode: DecodeAll, context: Sequence[int], raw: DecodeAll | None):
        """raw: a decode that cleans up no spaces, of a tokenizer whose `decode` does."""
        self._decode, self._raw = decode, raw
        self._ids = _end_of(context, decode)
        self._given = len(self._ids)
        self._text = decode(self._ids)

    def __call__(self, token: int | None) -> str:
        waiting = len(self._ids) - self._given
        if token is None:
            return self._give(len(self._ids), self._decode(self._ids)) if waiting else ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text == self._text:
            if waiting == LONGEST:  # tokens that have no text
                del self._ids[self._given :]
            return ""
        if not self._may_change(text):
            return self._give(len(self._ids), text)
        # Bytes that never become a character: those are given that no later one completes.
        for later in range(BYTES, 2 * BYTES) if waiting >= 2 * BYTES else ():
            settled = self._decode(self._ids[:-later])
            if text.startswith(settled):
                return self._give(len(self._ids) - later, settled)
        return ""

    def _may_change(self, text: str) -> bool:
        """Whether the next tokens may change the end of this text."""
        if text.endswith(REPLACEMENT):
            return True
        if self._raw is None:
            return False
        raw = self._raw(self._ids)
        return any(raw.endswith(pattern[:size]) for pattern in CLEANED for size in range(1, len(pattern)))

    def _give(self, end: int, text: str) -> str:
        """What is new in the text of the tokens up to `end`. The next decodes begin with tokens that are given now."""
        new = text[_common(self._text, text) :]
        start, kept = 0, text
        for later in (self._given, max(end - LONGEST, 0)):
            if known := self._decode(self._ids[later:end]):
                start, kept = later, known
                break
        self._ids, self._given, self._text = self._ids[start:], end - start, kept
        return new


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    if b.startswith(a):
        return len(a)
    return next(i for i, (one, other) in enumerate(zip(a + "\0", b + "\1", strict=False)) if one != other)


def _end_of(context: Sequence[int], decode: DecodeAll) -> list[int]:
    """The last tokens of a context, from the beginning of a character."""
    size = CONTEXT
    while size < len(context):
        text = decode(context[-size:])
        if text and not text.startswith(REPLACEMENT):
            return list(context[-size:])
        size = size + 1 if size < CONTEXT + BYTES else 2 * size
    return list(context)


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """Any object with encode and decode as what this package uses.

    Raises:
        TypeError: it does not have them.
    """
    return tokenizer if isinstance(tokenizer, (ByteTokenizer, AnyTokenizer)) else AnyTokenizer(tokenizer)


def tokenizer_of(model: Any) -> Tokenizer | None:
    """The tokenizer that came with the model's checkpoint; bytes for a vocabulary of 256; None if there is none.

    Raises:
        ValueError: the checkpoint's folder is gone.
    """
    folder = source_of(model)
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"{folder}: the folder of the model's tokenizer is gone; set model.source to where it is, or to None "
            "and pass tokenizer="
        )
    if folder is not None and (folder / "tokenizer.json").exists():
        return SubwordTokenizer(folder / "tokenizer.json")
    return ByteTokenizer() if model.config.vocab_size == 256 else None


def source_of(model: Any) -> Path | None:
    """The folder of the checkpoint that a model came from, if it needs it still."""
    source = getattr(model, "source", None)
    return None if source is None else Path(source)


def ids_of(encoded: Any) -> list[int]:
    """The token ids of one text as a tokenizer gives them, padding left out.

    Args:
        encoded: a list of ids, an object with `ids`, or a mapping with "input_ids"; the latter two may have an
            "attention_mask" too.

    Raises:
        TypeError: it is none of these.
    """
    mask = None
    if isinstance(encoded, Mapping):
        if "input_ids" not in encoded:
            raise TypeError(f"a prompt is a mapping of {list(encoded)} without input_ids; a conversation is messages=")
        encoded, mask = encoded["input_ids"], encoded.get("attention_mask")
    elif hasattr(encoded, "ids"):
        encoded, mask = encoded.ids, getattr(encoded, "attention_mask", None)
    if isinstance(encoded, str) or not hasattr(encoded, "__iter__"):
        raise TypeError(f"a prompt is {type(encoded).__name__}; expected token ids")
    ids = [integer("a token", token) for token in encoded]
    if mask is None:
        return ids
    if len(mask) != len(ids):
        raise ValueError(f"attention_mask has {len(mask)} entries; expected one for each of {len(ids)} tokens")
    return [token for token, counts in zip(ids, mask, strict=True) if counts]


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function that does not say
        return {}
