"""The tables, a file an architecture, found by file name: see `base` for what a file exports.

An architecture without a file is held by our own layout, hf, alone: its tensors under their canonical names, its config
under our own field names.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mamba_core import architectures, discovery
from mamba_core.weights import layouts
from mamba_core.weights.layouts import Layout
from mamba_core.weights.tables.base import Field, Scheme, Table

__all__ = [
    "architecture_of",
    "consents",
    "dialect",
    "find",
    "foreign",
    "holding",
    "of",
    "owner_of",
    "read_config",
    "write_config",
]

FOLDER = "weights.tables"
OWN_LAYOUT = "hf"
# Of a config, but not of its architecture.
NOT_OF_TABLES = ("task", "task_options", "extra")


def of(architecture: str) -> Mapping[str, Table]:
    """Layout -> the table of an architecture in it."""
    if architecture in discovery.names(FOLDER):
        return discovery.find(FOLDER, architecture).TABLES
    return {OWN_LAYOUT: _own_table(architecture)}


def holding(layout: str) -> dict[str, Table]:
    """Architecture -> its table, of every architecture that a layout can hold."""
    return {name: tables[layout] for name in architectures.names() if layout in (tables := of(name))}


def find(architecture: str, layout: str) -> Table:
    """The table of an architecture in a layout.

    Raises:
        ValueError: the layout cannot hold that architecture.
    """
    if (table := of(architecture).get(layout)) is not None:
        return table
    reasons = dict.fromkeys(table.consent for table in holding(layout).values() if table.consent)
    if architecture not in discovery.names(FOLDER):
        reasons[f"no file {FOLDER.replace('.', '/')}/{architecture}.py says how"] = None
    raise ValueError(
        f"a model of architecture {architecture!r} cannot be written as {layout}, whose library would compute another "
        f"function; expected layout {' or '.join(of(architecture))}{''.join(f'; {reason}' for reason in reasons)}"
    )


def architecture_of(layout: str, fields: Mapping[str, Any], fitting: Collection[str] = (), compat: Any = None) -> str:
    """The architecture that the fields of a config.json are of.

    fitting: those whose tensor names a file has, where it is known. compat: the one that the user names.

    Raises:
        ValueError: the fields name one that no table is of, or nothing tells which it is.
    """
    held, shape = holding(layout), layouts.find(layout)
    if (kind := shape.kind_of(fields)) is not None:
        if named := [name for name, table in held.items() if kind in table.kinds]:
            return named[0]
        known = ", ".join(repr(kind) for table in held.values() for kind in table.kinds)
        raise ValueError(f"config has {' '.join(shape.kind)} {kind!r}; this version reads {known}")
    told = [name for name, table in held.items() if _classes_of(shape, fields) & set(table.classes())]
    # The fields tell more than the names do, which several architectures may share.
    for names in (told, list(fitting), list(held)):
        chosen = _assumed(names, held, compat) or _closest(names, held, shape.flat(fields))
        if len(chosen) == 1:
            return chosen[0]
        if names:
            break
    raise ValueError(
        f"config has no {' '.join(shape.kind) or 'field'} that tells whether it is of {' or '.join(names)}; name it "
        "by compat (--compat)"
    )


def foreign(layout: str, architecture: str) -> dict[str, str]:
    """Fields of a layout's configs that mean something to another architecture alone -> that architecture."""
    own = of(architecture)[layout].theirs()
    return {
        field: name
        for name, table in holding(layout).items()
        if name != architecture
        for field in (*(row.theirs for row in table.rows().values()), *table.fixed)
        if field not in own
    }


def claim_of_another(layout: str, architecture: str, fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """(field, architecture): a field that says, in some library's words, that a model is of another architecture.

    A folder may say so in fields that its layout does not have. The fields are flat.
    """
    own, mine = of(architecture), layouts.find(layout)
    known = {field for table in own.values() for field in table.theirs()}
    kinds = {
        (field, kind) for where, table in own.items() for field in layouts.find(where).kind_name for kind in table.kinds
    }
    fixed = {field: values for table in own.values() for field, values in table.fixed.items()}
    free = {field for table in own.values() for field in table.theirs() - set(table.fixed) - set(table.constants)}
    for name in (name for name in discovery.names(FOLDER) if name != architecture):
        for where, table in of(name).items():
            shape = layouts.find(where)
            claims = [row.theirs for row in table.rows().values() if row.theirs not in known]
            claims += [
                field
                for field in shape.kind_name
                if fields.get(field) in table.kinds and (field, fields[field]) not in kinds
            ]
            if mine.classes is None and _classes_of(shape, fields) & set(table.classes()):
                claims.append(str(shape.classes))
            for field, values in table.fixed.items():
                value = fields.get(field)
                if value is not None and value in values and field not in free and value not in fixed.get(field, ()):
                    claims.append(field)
            if found := next((field for field in claims if fields.get(field) is not None), None):
                return found, name
    return None


def owner_of(name: str) -> str | None:
    """The architecture that has a class of that name in some library."""
    return next(
        (each for each in architectures.names() if any(name in table.classes() for table in of(each).values())), None
    )


def consents() -> tuple[str, ...]:
    """The architectures that some layout reads only for who names them."""
    return tuple(name for name in architectures.names() if any(table.consent for table in of(name).values()))


def dialect(fields: Mapping[str, Any]) -> str | None:
    """The layout whose fields these are, without a checkpoint; None for our own fields."""
    fitting = [name for name in layouts.names() if set(layouts.find(name).dialect) & set(fields)]
    return next((name for name in fitting if layouts.find(name).dialect[0] in fields), next(iter(fitting), None))


def modules() -> tuple[str, ...]:
    """The modules whose config objects have the fields of a layout's config.json."""
    return tuple(module for name in layouts.names() if (module := layouts.find(name).module) is not None)


def layout_of_object(config: Any) -> str | None:
    """The layout of the library that a config object is of, None where it is of none."""
    for base in type(config).__mro__:
        for name in layouts.names():
            if (module := layouts.find(name).module) and f"{base.__module__}.".startswith(f"{module}."):
                return name
    return None


def read_object(layout: str, fields: Mapping[str, Any]) -> Any:
    """A config from the fields of a config object of a layout's library.

    Raises:
        TypeError, ValueError: as for `read_config`; also a function that nobody gets without naming it.
    """
    from mamba_core.weights import configs

    name = architecture_of(layout, fields)
    if (reason := find(name, layout).consent) is not None:
        kind = architectures.find(name).Config.__name__
        raise ValueError(f"{reason}; a {kind} of mamba_core, with the same sizes, is that function")
    table = find(name, layout)
    # A library that keeps the vocabulary elsewhere builds layers alone from its config.
    alone = "layers" in {scheme.task for scheme in table.schemes} and "vocab_size" not in fields
    return configs.read_config(layout, fields, architecture=name, told={"task": "layers"} if alone else None)


def read_config(layout: str, fields: Mapping[str, Any]) -> Any:
    """A config from the fields of a layout's library.

    Raises:
        TypeError: what should be a JSON object is none.
        ValueError: the fields are of an architecture that is not known, or of another function than it computes.
    """
    from mamba_core.weights import configs

    return configs.read_config(layout, fields)


def write_config(layout: str, config: Any) -> dict[str, Any]:
    """The fields that a layout's library reads.

    Raises:
        ValueError: the library cannot run a model of this config.
    """
    from mamba_core.weights import configs

    return configs.write_config(layout, config)


def _assumed(names: list[str], held: Mapping[str, Table], compat: Any) -> list[str]:
    """Those of the architectures that are left when the user, or else the library's habit, has a say."""
    if compat in names:
        return [compat]
    return [name for name in names if held[name].assumed] if len(names) > 1 else names


def _closest(names: list[str], held: Mapping[str, Table], fields: Mapping[str, Any]) -> list[str]:
    """Those of the architectures that have the most of the fields."""
    known = {name: len(held[name].theirs().intersection(fields)) for name in names}
    return [name for name in names if known[name] == max(known.values())]


def _classes_of(layout: Layout, fields: Mapping[str, Any]) -> set[str]:
    names = fields.get(layout.classes) if layout.classes else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _own_table(architecture: str) -> Table:
    names = (item.name for item in dataclasses.fields(architectures.find(architecture).Config))
    return Table(
        schemes=(Scheme("lm", (), as_is=True),),
        fields={name: Field(name) for name in names if name not in NOT_OF_TABLES},
        kinds=(f"mamba_core_{architecture}",),
    )
