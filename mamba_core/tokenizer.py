"""Text as tokens and tokens as text, whole characters only."""

import codecs


class ByteTokenizer:
    """Text as its UTF-8 bytes: token i is byte i."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decoder(self):
        """A function from a token to the whole characters that it completes; `None` flushes."""
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: (
            incremental.decode(b"", final=True) if token is None else incremental.decode(bytes([token]))
        )


class SubwordTokenizer:
    """A `tokenizers.Tokenizer` from a tokenizer.json."""

    def __init__(self, path):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ImportError("reading tokenizer.json needs tokenizers; pip install 'mamba_core[hub]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as fault:  # tokenizers raises the bare class
            raise ValueError(f"{path}: not a tokenizer that can be read: {fault}") from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decoder(self):
        """A function from a token to the whole characters that it completes; `None` flushes."""
        from tokenizers.decoders import DecodeStream

        pieces = DecodeStream(skip_special_tokens=True)
        return lambda token: "" if token is None else pieces.step(self._tokenizer, token) or ""


def tokenizer_of(model):
    """The tokenizer that came with the model's checkpoint; bytes for a vocabulary of 256; None if there is none."""
    folder = getattr(model, "source", None)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return SubwordTokenizer(folder / "tokenizer.json")
    return ByteTokenizer() if model.config.vocab_size == 256 else None
