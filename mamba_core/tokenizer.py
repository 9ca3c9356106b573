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

    def encode_more(self, text: str) -> list[int]:
        """Text that goes on from other text: without the tokens that some models have at the beginning of one."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decoder(self):
        """A function from a token to the whole characters that it completes; `None` flushes."""
        from tokenizers.decoders import DecodeStream

        pieces, waiting = DecodeStream(skip_special_tokens=True), []

        def decode(token: int | None) -> str:
            if token is None:
                # What is left are bytes of no whole character, which a decode of their own replaces.
                return self._tokenizer.decode(waiting)
            waiting.append(token)
            if piece := pieces.step(self._tokenizer, token):
                waiting.clear()
            return piece or ""

        return decode


def tokenizer_of(model):
    """The tokenizer that came with the model's checkpoint; bytes for a vocabulary of 256; None if there is none."""
    folder = getattr(model, "source", None)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return SubwordTokenizer(folder / "tokenizer.json")
    return ByteTokenizer() if model.config.vocab_size == 256 else None
