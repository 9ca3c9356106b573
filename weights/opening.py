"""Checkpoints in any layout, opened under canonical names and checked against their config."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core import architectures, tasks
from mamba_core.spec.params import Parameter, parameter_table
from mamba_core.weights import adapters, configs, layouts, tokens
from mamba_core.weights.detect import Detected, described, detect
from mamba_core.weights.formats import DTYPES, FLOATS, CheckpointError, TensorSource, boundary, fill
from mamba_core.weights.io import Checkpoint, open_checkpoint
from mamba_core.weights.layouts import HIDDEN
from mamba_core.weights.names import EMBEDDING, HEAD, Piece, Scheme, Stored, stored_tensors
from mamba_core.weights.quantised import dequantised
from mamba_core.weights.source import config_path, locate, read_config
from mamba_core.weights.transforms import SAME

_MOST_FAULTS = 20  # in one message
_MOST_SHOWN = 8  # of what is not read
_SOME_MISSING = 1000  # parameters, which are looked for one by one


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has been checked against its config; its tensors are not loaded until asked for.

    stored: canonical name -> where it is in the file, in the table's order.
    left_out: what the file holds beside the model: tensors, and entries of a training checkpoint.
    evidence: how the layout was told, a short sentence.
    """

    layout: str
    config: Any
    folder: Path
    checkpoint: Checkpoint
    stored: dict[str, Stored]
    left_out: tuple[str, ...]
    evidence: str

    @property
    def dtype(self) -> str:
        """The compute dtype that it was saved in: that of its first parameter that need not be float32.

        It is float32 for float64.
        """
        table = parameter_table(self.config)
        telling = next((name for name, parameter in table.items() if not parameter.float32), next(iter(table)))
        stored = self._dtype_of(telling)
        return "float32" if stored == "float64" else stored

    def sources(self) -> Iterator[tuple[Parameter, str, TensorSource]]:
        """(parameter, its name in the file, its source under the canonical name) in the table's order."""
        for name, parameter in parameter_table(self.config).items():
            source = TensorSource(name, parameter.shape, self._dtype_of(name), partial(self._read, parameter))
            if (whole := self.stored[name].whole) is not None:
                source = source._replace(stream=partial(self._stream, whole))
            yield parameter, self.stored[name].label, source

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, array) in the table's order; each read when its turn comes."""
        for _, _, source in self.sources():
            yield source.name, source.read()

    def _dtype_of(self, canonical: str) -> str:
        return self.checkpoint.header(self.stored[canonical].pieces[0].name).dtype

    def _read(self, parameter: Parameter) -> np.ndarray:
        pieces = self.stored[parameter.name].pieces
        if len(pieces) == 1 and not pieces[0].where:
            return self._read_piece(pieces[0])
        for piece in pieces:
            self.checkpoint.tensors[piece.name].file.scratch.clear()  # for it may be as large as what is made here
        joined = np.empty(parameter.shape, DTYPES[self._dtype_of(parameter.name)].numpy)
        for piece in pieces:
            if piece.transform is SAME and piece.shape:
                fill(joined[piece.where], self._stream(piece))
            else:
                joined[piece.where] = self._read_piece(piece)
        return joined

    def _read_piece(self, piece: Piece) -> np.ndarray:
        with self._naming(piece):
            return piece.transform.read(self.checkpoint[piece.name])

    def _stream(self, piece: Piece) -> Iterator[np.ndarray]:
        with self._naming(piece):
            yield from self.checkpoint.blocks(piece.name)

    @contextmanager
    def _naming(self, piece: Piece) -> Iterator[None]:
        """Faults of a tensor name it and its folder."""
        try:
            yield
        except ValueError as fault:
            text = str(fault).removeprefix(f"{self.folder}{os.sep}")
            raise CheckpointError(f"{self.folder}: tensor {piece.name!r}: {text}") from None


def open_model(
    source: str | Path, *, layout: str | None = None, revision: str | None = None, compat: str | None = None
) -> OpenedModel:
    """Open a checkpoint in any readable layout.

    Args:
        source: a folder, a file, its config beside it, or the id of a repository on the Hugging Face hub.
        layout: a file of `weights/layouts`, hyphens allowed; detected by default, from the config and the tensor names
            together.
        revision: of the hub repository.
        compat: the architecture that the checkpoint is to be read as. Checkpoints that a plain
            conversion would change are read only so.

    Raises:
        CheckpointError: every fault of the names, shapes and dtypes at once; a checkpoint that needs `compat`.
        ValueError: an unknown layout, or a compat that this checkpoint is not for.
    """
    if layout is not None:
        layout = layouts.key(layout)
    with boundary(source):
        return _open(locate(source, revision), layout, compat)


def _open(path: Path, layout: str | None, compat: str | None) -> OpenedModel:
    folder = path if path.is_dir() else path.parent
    adapters.refuse_folder(path)
    checkpoint = open_checkpoint(path)
    config_file = config_path(folder, [file.name for file in checkpoint.files])
    fields = read_config(config_file)
    adapters.refuse_names(path, checkpoint)
    fields, checkpoint = dequantised(path, fields, checkpoint)
    detected = detect(path, fields, checkpoint, layout, compat, config_file.name)
    name = detected.architecture
    if compat not in (None, name):
        raise ValueError(f"compat is {compat!r}, but {path}, of layout {detected.layout}, is of architecture {name!r}")
    if detected.table.consent is not None and compat is None:
        raise CheckpointError(
            f"{path}: {detected.table.consent}; compat={name!r} (--compat {name}) reads it with its own arithmetic"
        )
    config = _with_tokens(folder, fields, _read_config(config_file, fields, checkpoint, detected), detected)
    return _checked(path, folder, config, checkpoint, detected)


def _read_config(path: Path, fields: dict | None, checkpoint: Checkpoint, detected: Detected):
    """The config that the file's fields and, where its library saves none or not all, its tensors tell."""
    folder, sized = path.parent, layouts.find(detected.layout).sized_by_tensors
    if fields is None and not sized:
        name, layout = layouts.find(detected.layout).config_file, detected.layout
        raise CheckpointError(f"{folder / name}: no such file; a checkpoint of layout {layout} needs its {name}")
    told = {"shapes": _shapes(checkpoint, detected), "told": _told(checkpoint, detected)} if sized else {}
    if sized and fields and (shape := layouts.find(detected.layout)).key(fields) is None:
        raise CheckpointError(
            f"{path}: has none of the fields {', '.join(shape.keys)}, so it is no config of layout {detected.layout}; "
            "that layout needs none, so move it away, or write its fields as that layout has them"
        )
    if sized and not detected.fits:
        named = f"the tensors do not have the names of layout {detected.layout}"
        raise CheckpointError(f"{folder}: {named}: {described(checkpoint, [detected.scheme])}")
    try:
        config = configs.read_config(detected.layout, fields or {}, architecture=detected.architecture, **told)
        if tasks.of(config).generates and detected.scheme.name(HEAD) is None:
            # Names without a head say so whatever the config says.
            config = replace(config, task=detected.scheme.task)
    except (ValueError, TypeError) as fault:
        raise CheckpointError(f"{path if fields is not None else folder}: {fault}") from None
    return config


def _with_tokens(folder: Path, fields: dict | None, config, detected: Detected):
    """The config with the ids of the special tokens that the files beside it give."""
    rows = detected.table.rows()
    given = dict(fields or {})
    if isinstance(hidden := given.get(HIDDEN), dict):
        given |= hidden
    silent = [name for name in tokens.FIELDS if given.get(rows[name].theirs if name in rows else name) is None]
    said = tokens.read_generation(folder)
    ids = tokens.read_tokenizer(folder, [name for name in silent if name not in said]) | said
    try:
        return replace(config, **ids) if ids else config
    except ValueError as fault:
        raise CheckpointError(f"{folder / tokens.GENERATION}: {fault}") from None


def _shapes(checkpoint: Checkpoint, detected: Detected) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by canonical name."""
    shapes = {}
    for own, name in detected.names.items():
        if known := detected.scheme.canonical(own):
            canonical, transform = known
            shape = checkpoint.header(name).shape
            try:
                shapes[canonical] = transform.canonical_shape(shape)
            except ValueError:
                fault = f"{name} has shape {shape}; expected {transform.name}"
                raise CheckpointError(f"{checkpoint.files[0]}: {fault}") from None
    return shapes


def _told(checkpoint: Checkpoint, detected: Detected) -> dict[str, Any]:
    """The fields of our config that names and bytes tell."""
    told: dict[str, Any] = {"task": detected.scheme.task}
    head, embedding = detected.scheme.name(HEAD), detected.scheme.name(EMBEDDING)
    if head is not None and embedding is not None:
        # Torch saves a tied head as a copy of the embedding, so a head that is there need not be one of its own.
        found = [detected.names[name] for name in (head, embedding) if name in detected.names]
        told["tie_embeddings"] = len(found) < 2 or checkpoint.have_same_bytes(*found)
    return told


def _checked(path: Path, folder: Path, config, checkpoint: Checkpoint, detected: Detected) -> OpenedModel:
    if config.n_layer > len(checkpoint):  # before a table of so many layers is made
        raise CheckpointError(
            f"{path}: does not fit its config: n_layer is {config.n_layer}, but the file has {len(checkpoint)} tensors"
        )
    parameters = architectures.of(config).parameters(config)
    if next(islice(parameters, 2 * len(checkpoint) + _SOME_MISSING, None), None) is not None:
        raise CheckpointError(
            f"{path}: does not fit its config: n_layer is {config.n_layer}, which makes more than twice as many "
            f"parameters as the file has tensors, {len(checkpoint)}"
        )
    scheme = _scheme(config, detected)
    try:
        own = stored_tensors(config, scheme, len(checkpoint))
    except ValueError as fault:
        raise CheckpointError(f"{path}: does not fit its config: {fault}") from None
    files = dict(detected.names)
    embedding, head = (files.get(scheme.name(name) or "") for name in (EMBEDDING, HEAD))
    tied_head = head if config.tie_embeddings and tasks.of(config).generates else None
    if embedding is not None and embedding == head and not config.tie_embeddings:
        del files[scheme.name(EMBEDDING) or ""]  # a head of its own does not stand for the embedding

    def in_file(piece: Piece) -> Piece:
        return piece._replace(name=files.get(piece.name, detected.prefix + piece.name))

    stored = {name: Stored(tuple(map(in_file, tensor.pieces))) for name, tensor in own.items()}
    left_out = detected.of_wrappers
    _check_tensors(path, checkpoint, stored, left_out, tied_head, detected.layout)
    left_out += checkpoint.skipped
    evidence = detected.evidence + (f"; not read: {_some(left_out)}" if left_out else "")
    for name, only in detected.table.required.items():
        if (value := getattr(config, name)) != only:
            evidence += f"; {name} is the config's {value}, though {detected.layout} computes with {only}"
    if (reason := detected.table.differs(config)) is not None:
        evidence += f"; read as it was trained, though {reason}"
    return OpenedModel(detected.layout, config, folder, checkpoint, stored, left_out, evidence)


def _scheme(config, detected: Detected) -> Scheme:
    """The scheme of the file's names, with the names of a task that it is not for."""
    if config.task in {scheme.task for scheme in detected.table.schemes if not scheme.as_is}:
        return detected.scheme
    return replace(detected.scheme, task=config.task, as_is=layouts.find(detected.layout).holds_every_task)


def _check_tensors(
    path: Path,
    checkpoint: Checkpoint,
    stored: Mapping[str, Stored],
    left_out: tuple[str, ...],
    tied_head: str | None,
    layout: str,
) -> None:
    allowed = {*(name for tensor in stored.values() for name in tensor.names), *left_out, tied_head}
    faults = [f"missing {name}" for tensor in stored.values() for name in tensor.names if name not in checkpoint]
    faults += [f"unexpected {name}" for name in checkpoint if name not in allowed]
    for canonical, tensor in stored.items():
        dtypes: dict[str, str] = {}
        for piece in tensor.pieces:
            if piece.name not in checkpoint:
                continue
            shape, dtype, _ = checkpoint.header(piece.name)
            if shape != piece.shape:
                faults.append(f"{piece.name} has shape {shape}, expected {piece.shape}")
            if dtype not in FLOATS:
                faults.append(f"{piece.name} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
            dtypes.setdefault(dtype, piece.name)
        if len(dtypes) > 1:
            found = " and ".join(f"{name} has {dtype}" for dtype, name in dtypes.items())
            faults.append(f"{canonical} is joined of tensors of several dtypes: {found}")
    if not faults and tied_head is not None and tied_head in checkpoint:
        embedding = stored[EMBEDDING].pieces[0].name
        if not checkpoint.have_same_bytes(tied_head, embedding):
            faults.append(f"{tied_head} differs from {embedding}, but the config ties them")
    if faults:
        more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        shown = "; ".join(faults[:_MOST_FAULTS]) + more
        if not any(tensor.pieces[0].name in checkpoint for tensor in stored.values()):
            shown += f"; {described(checkpoint, ())}"
        raise CheckpointError(f"{path}: does not fit its config: {shown} (read as {layout})")


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
