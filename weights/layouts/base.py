"""What a layout is: how one library lays out its checkpoints, whatever the architecture.

A file in this folder exports `LAYOUT`. What the library calls the tensors and fields of an architecture stands in
`weights/tables/<architecture>.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIDDEN = "mamba_core"  # the field that holds what a library has no field for


@dataclass(frozen=True)
class Layout:
    """One library's way to lay out checkpoints.

    Attributes:
        file_format: the format that the library reads, a key of `formats.WRITERS`.
        config_file: the name of the file with the config's fields.
        weights_file: the one name that files of weights have, None where other layouts have the same.
        metadata_format: what its safetensors files say of who wrote them.
        told_by_format: nothing but `metadata_format` tells its files from those of another layout, so that no other
            format may hold them.
        module: the library's module, with those inside of it, whose config objects have the fields of config.json.
        keys: fields of config.json that tell it, the plainest first.
        dialect: the same for a config without a checkpoint, in `mamba_core.config.from_dict`, the plainest first.
        kind: the field that names the architecture, as the path to it; () where there is none.
        classes: the field that names the class which saved the model.
        dtype: the fields that say the compute dtype, the first of which is written.
        nested: the object that holds the fields of the blocks. Tables write its fields as "nested.name". Fields there
            are written only where they differ from the defaults, and unknown ones are refused.
        keeps_unknown: the library's loader allows fields that it does not know.
        hides: fields of ours that the library does not have are kept in the object `HIDDEN`: "always", "changed" for
            those that differ from the defaults, or "never".
        shadows: unknown fields that would mean something to the library are kept in the object `HIDDEN` too; else they
            are dropped.
        sized_by_tensors: the library saves tensors alone, so that a config.json need not be there and shapes tell the
            sizes.
        counts_rows: the library's vocab_size counts the rows of the embedding, padding included.
        writes_tied_head: the library wants a tied head in the file, as a copy of the embedding.
        holds_every_task: a task that no scheme of the table is for is held too, its own parameters under their
            canonical names.
    """

    file_format: str
    config_file: str = "config.json"
    weights_file: str | None = None
    metadata_format: str = "pt"
    told_by_format: bool = False
    module: str | None = None
    keys: tuple[str, ...] = ()
    dialect: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    classes: str | None = None
    dtype: tuple[str, ...] = ()
    nested: str | None = None
    keeps_unknown: bool = True
    hides: str = "never"
    shadows: bool = False
    sized_by_tensors: bool = False
    counts_rows: bool = False
    writes_tied_head: bool = False
    holds_every_task: bool = False

    def key(self, fields: Mapping[str, Any]) -> str | None:
        """The field by which a config.json can be of this layout; None if it cannot."""
        if "architecture" in fields:  # this project's own fields, which no layout has
            return None
        return next((key for key in self.keys if key in fields), None)

    @property
    def kind_name(self) -> tuple[str, ...]:
        """The name of the field that names the architecture among `flat` fields; () where there is none."""
        return (".".join(self.kind),) if self.kind else ()

    def kind_of(self, fields: Mapping[str, Any]) -> Any:
        """The value of the field that names the architecture, None where nothing does."""
        value = fields if self.kind else None
        for name in self.kind:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def flat(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with those of the nested object as "nested.name".

        Raises:
            TypeError: what should be an object is none.
        """
        flat = dict(fields)
        if self.nested is not None:
            inner = flat.pop(self.nested, None) or {}
            if not isinstance(inner, Mapping):
                raise TypeError(f"config has {self.nested} {inner!r}; expected a JSON object")
            flat |= {f"{self.nested}.{name}": value for name, value in inner.items()}
        return flat

    def nest(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `flat`."""
        if self.nested is None:
            return dict(flat)
        prefix = f"{self.nested}."
        inner = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
        outer = {name: value for name, value in flat.items() if not name.startswith(prefix)}
        return outer | {self.nested: inner}
