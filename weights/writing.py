"""Checkpoints written as a layout has them, from sources under canonical names."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from mamba_core import tasks
from mamba_core.spec.params import Parameter, parameter_table
from mamba_core.weights import configs, layouts, tables, tokens
from mamba_core.weights.companions import copy_companion
from mamba_core.weights.formats import WRITERS, Progress, TensorSource
from mamba_core.weights.names import EMBEDDING, HEAD, Piece, Stored, stored_tensors
from mamba_core.weights.source import TOKENIZER_FILES


def write_model(folder: Path, config, parameters: Mapping[str, np.ndarray], *, layout: str, dtype: str) -> None:
    """Write the config and the tensors of a model into a folder that exists.

    parameters: by canonical name, asked for one at a time. dtype: their compute dtype.
    """
    sources = [
        TensorSource(name, parameter.shape, parameter.dtype(dtype), partial(parameters.__getitem__, name))
        for name, parameter in parameter_table(config).items()
    ]
    write_layout(folder, config, sources, layout)


def write_layout(
    folder: Path,
    config,
    sources: Iterable[TensorSource],
    layout: str,
    file_format: str | None = None,
    *,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the config and tensors under canonical names as a layout has them.

    file_format: a key of `WRITERS`; the layout's own by default. shard_bytes, progress: as the writers have them; only
    safetensors has shards.

    Raises:
        ValueError: an unknown layout or file format, or a config that the layout cannot hold.
    """
    layout = layouts.key(layout)
    shape = layouts.find(layout)
    file_format = shape.file_format if file_format is None else file_format
    if file_format not in WRITERS:
        raise ValueError(f"file_format is {file_format!r}; expected one of {', '.join(WRITERS)}")
    if shape.told_by_format and file_format != shape.file_format:
        raise ValueError(
            f"layout {layout!r} cannot be written as {file_format}, in which nothing tells it from another layout; "
            f"expected {shape.file_format}"
        )
    fields = configs.write_config(layout, config)
    sources = list(sources)
    written = stored_sources(config, sources, layout)
    if shape.dtype:  # the library keeps the dtype beside the config
        fields[shape.dtype[0]] = _compute_dtype(config, sources)
    WRITERS[file_format](folder, written, {"format": shape.metadata_format}, shard_bytes, progress)
    (folder / shape.config_file).write_text(json.dumps(fields, indent=2) + "\n")


def stored_sources(config, sources: list[TensorSource], layout: str) -> list[TensorSource]:
    """The sources as they are stored, a copy of a tied embedding included.

    Raises:
        ValueError: the layout cannot hold a model of this config.
    """
    scheme, table = configs.scheme_to_write(config, layout), parameter_table(config)
    stored = stored_tensors(config, scheme)
    written = [part for source in sources for part in _parts(source, stored[source.name])]
    if tasks.of(config).generates and config.tie_embeddings and layouts.find(layout).writes_tied_head:
        embedding = next(source for source in sources if source.name == EMBEDDING)
        head = Parameter(HEAD, "vd", embedding.shape, table[EMBEDDING].init)
        written += _parts(embedding, scheme.stored(head))
    return written


def copy_companions(source: Path | None, target: Path, config, layout: str) -> None:
    """Copy the files of the tokenizer and of generation that lie beside a checkpoint, with the config's token ids.

    What cannot be copied, or lies elsewhere behind a link, is left out with a warning.

    source: None where there is none.
    """
    if source is not None:
        for name in TOKENIZER_FILES:
            copy_companion(source / name, target / name)
    layout = layouts.key(layout)
    told = layouts.find(layout).hides != "never" or "eos_token_id" in tables.find(config.architecture, layout).fields
    tokens.write_generation(source, target, config, told)


def _compute_dtype(config, sources: list[TensorSource]) -> str:
    """The dtype of the first parameter that need not be float32."""
    table = parameter_table(config)
    return next((source for source in sources if not table[source.name].float32), sources[0]).dtype


def _parts(source: TensorSource, stored: Stored) -> Iterator[TensorSource]:
    """The sources of the tensors in the file that a canonical one becomes."""
    read = source.read if len(stored.pieces) == 1 else _Shared(source.read, len(stored.pieces))
    for piece in stored.pieces:
        stream = None if stored.whole is None else source.stream
        yield source._replace(name=piece.name, shape=piece.shape, read=_reader(read, piece), stream=stream)


def _reader(read: Callable[[], np.ndarray], piece: Piece) -> Callable[[], np.ndarray]:
    return lambda: piece.transform.write(read()[piece.where])


class _Shared:
    """A canonical tensor that is read once for all its parts, and let go with the last."""

    def __init__(self, read: Callable[[], np.ndarray], uses: int) -> None:
        self._read, self._uses, self._left = read, uses, uses
        self._value: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        value = self._read() if self._value is None else self._value
        self._left -= 1
        self._value = value if self._left else None
        if not self._left:
            self._left = self._uses
        return value
