"""Tensor names: tables per layout from canonical names to theirs and how they are stored, anchored and both ways.

Canonical names are those of transformers' MambaForCausalLM. A table translates the names of the parameter table of a
config, so it names every tensor that a file of that config holds and no other.
"""

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from mamba_core.spec.params import parameter_table
from mamba_core.weights.transforms import CHANNELS_LAST, DENSE, SAME, Transform

EMBEDDING = "backbone.embeddings.weight"
FINAL_NORM = "backbone.norm_f.weight"
HEAD = "lm_head.weight"
LAYERS = "backbone.layers"
_CONV = "mixer.conv1d.weight"


class Row(NamedTuple):
    """Canonical names and theirs, as patterns: {layer} is an index, {rest} is any text."""

    canonical: str
    stored: str
    transform: Transform = SAME


class Stored(NamedTuple):
    """A tensor's name in the file, and how it is stored there."""

    name: str
    transform: Transform


class Scheme(NamedTuple):
    """The names of one kind of model in one layout.

    task: that of the config. left_out: tensors that such a file may hold too, which are not read.
    """

    task: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()

    def stored(self, canonical: str) -> Stored | None:
        for row in self.rows:
            if match := _pattern(row.canonical).fullmatch(canonical):
                return Stored(row.stored.format(**match.groupdict()), row.transform)
        return None

    def canonical(self, name: str) -> tuple[str, Transform] | None:
        for row in self.rows:
            if match := _pattern(row.stored).fullmatch(name):
                return row.canonical.format(**match.groupdict()), row.transform
        return None

    def marks(self) -> list[str]:
        """The names that tell a file of this scheme from those of the others."""
        marks = (self.stored(EMBEDDING), self.stored(f"{LAYERS}.0.{_CONV}"))
        return [stored.name for stored in marks if stored is not None]

    def fits(self, names: Collection[str]) -> bool:
        """Whether a file of these names has this scheme. One without an embedding has no names but of layers."""
        if not all(name in names for name in self.marks()):
            return False
        return self.stored(EMBEDDING) is not None or all(self.canonical(name) for name in names)


def _table(layers: str, embedding=None, final_norm=None, head=None, mixer: dict | None = None) -> tuple[Row, ...]:
    """mixer: canonical name within a layer -> theirs and the transform, where they differ."""
    rows = [
        Row(f"{LAYERS}.{{layer}}.{ours}", f"{layers}.{{layer}}.{theirs}", transform)
        for ours, (theirs, transform) in (mixer or {}).items()
    ]
    rows.append(Row(f"{LAYERS}.{{layer}}.{{rest}}", f"{layers}.{{layer}}.{{rest}}"))
    outer = {EMBEDDING: embedding, FINAL_NORM: final_norm, HEAD: head}
    return (*rows, *(Row(ours, theirs) for ours, theirs in outer.items() if theirs is not None))


_HF = (LAYERS, EMBEDDING, FINAL_NORM, HEAD)
_MAMBAPY = ("mamba.layers", "embedding.weight", "norm_f.weight", "lm_head.weight")
_MAMBAPY_MLX_MIXER = {
    _CONV: ("mixer.conv1d.conv1d.weight", DENSE),
    "mixer.conv1d.bias": ("mixer.conv1d.conv1d.bias", SAME),
}
_MINIMAMBA = ("backbone.layers", "embedding.token_embedding.weight", "backbone.norm.weight")

# layout -> its schemes. Of those of one task the first is written.
SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "hf": (
        Scheme("lm", _table(*_HF)),
        Scheme("features", _table("layers", "embeddings.weight", "norm_f.weight")),
    ),
    "mamba_ssm": (Scheme("lm", _table(LAYERS, "backbone.embedding.weight", FINAL_NORM, HEAD)),),
    "mambapy": (
        Scheme("lm", _table(*_MAMBAPY)),
        Scheme("layers", _table("layers")),
    ),
    "mambapy_mlx": (
        Scheme("lm", _table(*_MAMBAPY, mixer=_MAMBAPY_MLX_MIXER)),
        Scheme("layers", _table("layers", mixer=_MAMBAPY_MLX_MIXER)),
    ),
    "minimamba": (
        Scheme("lm", _table(*_MINIMAMBA, "lm_head.lm_head.weight")),
        Scheme("features", _table(*_MINIMAMBA), ("classifier.classifier.weight", "classifier.classifier.bias")),
        # Its releases before 1.0, and the class that 1.0 keeps for them.
        Scheme("lm", _table("layers", "embedding.weight", "norm_f.weight", "lm_head.weight")),
    ),
    "mlx_lm": (Scheme("lm", _table(*_HF, mixer={_CONV: (_CONV, CHANNELS_LAST)})),),
}

# Layouts whose library wants a tied head in the file, as a copy of the embedding. Read, it may be there or not.
WRITES_TIED_HEAD = ("mamba_ssm", "mambapy", "mambapy_mlx", "minimamba")


def scheme_to_write(config, layout: str) -> Scheme:
    """The scheme of the config's task. Raises ValueError where the layout has none."""
    for scheme in SCHEMES[layout]:
        if scheme.task == config.task:
            return scheme
    others = [name for name, schemes in SCHEMES.items() if any(scheme.task == config.task for scheme in schemes)]
    raise ValueError(
        f"layout {layout!r} cannot hold a model of task {config.task!r}; expected one of {', '.join(others)}"
    )


def scheme_of(names: Collection[str], layout: str) -> Scheme | None:
    """The scheme of the layout that a file of these names has. A head tells one with a head from one without."""
    fitting = [scheme for scheme in SCHEMES[layout] if scheme.fits(names)]
    for scheme in fitting:
        head = scheme.stored(HEAD)
        if head is not None and head.name in names:
            return scheme
    return fitting[-1] if fitting else None


def stored_tensors(config, scheme: Scheme) -> dict[str, Stored]:
    """Canonical name -> theirs and its transform, for every parameter of the config, in the order of its table."""
    return {name: scheme.stored(name) for name in parameter_table(config)}


@cache
def _pattern(template: str) -> re.Pattern:
    text = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{rest\}", "(?P<rest>.+)")
    return re.compile(text)
