"""What a table says: how one layout's library names the tensors and config fields of one architecture.

A file in this folder has the name of its architecture and exports `TABLES`, layout -> `Table`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mamba_core.weights.names import Row, Scheme
from mamba_core.weights.transforms import Shape

__all__ = ["ABSENT", "Field", "Row", "Scheme", "Table"]

ABSENT: Any = object()  # no value


class Field(NamedTuple):
    """A field of a library's config.

    theirs: its name.
    default: the library's default; without one that of our config.
    writes: the one value that is written. The config's own is then kept among the hidden fields.
    """

    theirs: str
    default: Any = ABSENT
    writes: Any = ABSENT


def nothing(*_: Any) -> dict[str, Any]:
    return {}


def unchanged(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    return values


@dataclass(frozen=True)
class Table:
    """One architecture in one layout.

    Attributes:
        schemes: the names of the tensors, a scheme for each kind of model. Of those of one task the first is written.
        fields: our config field -> theirs.
        kinds: values of the layout's field that names the architecture, such as model_type; the first is written.
        assumed: the layout's library takes this architecture where that field is missing.
        fixed: their field -> the values with which it is this architecture's function. Any other value is refused;
            null and a missing field count as the first.
        reasons: their field of `fixed` -> why no other value is read.
        constants: their field -> the value that is written.
        unused: their fields that follow from others or concern speed only. They are not kept.
        ignored: their fields that say nothing about this architecture, though they may about another. They are kept.
        required: our field -> the one value that the library can run.
        required_of: task -> the same for models of that task.
        differs: our config -> why the library would compute another function than the model's, None where it would
            not. Such a model is not written. A file of one is read, for the library did not train it.
        unread: the end of a tensor's name -> why a file that has one is not read.
        consent: why a plain conversion would change the function. The user must then name the architecture
            (`compat`).
        hides: our fields that `derived` hides where it must. The others without a row are hidden as the layout says.
        sizes: shapes by canonical name -> the fields of our config that they tell, and what `completed` makes fields
            of; for layouts that need it. Raises ValueError where they tell none.
        completed: (values of our config, the fields that are left, what `sizes` told) -> the values, where they follow
            from each other. It takes out of the fields that are left what it uses.
        derived: our config -> their fields that no row gives, or that a row gives otherwise. Raises ValueError for a
            config that the library cannot hold.
    """

    schemes: tuple[Scheme, ...]
    fields: Mapping[str, str | Field]
    kinds: tuple[str, ...] = ()
    assumed: bool = False
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    required: Mapping[str, Any] = field(default_factory=dict)
    required_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    differs: Callable[[Any], str | None] = lambda config: None
    unread: Mapping[str, str] = field(default_factory=dict)
    consent: str | None = None
    hides: tuple[str, ...] = ()
    sizes: Callable[[Mapping[str, Shape]], dict[str, Any]] = nothing
    completed: Callable[[dict[str, Any], dict[str, Any], Mapping[str, Any]], dict[str, Any]] = unchanged
    derived: Callable[[Any], dict[str, Any]] = nothing

    def rows(self) -> dict[str, Field]:
        """Our field -> theirs, spelt out."""
        return {ours: theirs if isinstance(theirs, Field) else Field(theirs) for ours, theirs in self.fields.items()}

    def theirs(self) -> set[str]:
        """The names of all fields of the library that the table knows."""
        names = {row.theirs for row in self.rows().values()}
        return names | {*self.fixed, *self.constants, *self.unused, *self.ignored}

    def classes(self) -> dict[str, str]:
        """The name of a class of the library -> the task of its models."""
        return {name: scheme.task for scheme in self.schemes for name in scheme.classes}
