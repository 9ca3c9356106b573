"""Language models: a text file, a folder of them, or token ids, one after another."""

from pathlib import Path

from mamba_core.data import read_tokens
from mamba_core.datasets.base import Data, Option, Source

DATA = "a text file, a folder of them, or .npy ids"
OPTIONS: tuple[Option, ...] = ()
HELD_OUT = None
TEXTS = True


def read(source: Source) -> Data:
    data = read_tokens(source.path, source.tokenizer)
    held_out = source.held_out
    return Data(
        source.config, data, read_tokens(held_out, source.tokenizer) if isinstance(held_out, Path) else held_out
    )
