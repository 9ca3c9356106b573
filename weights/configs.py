"""The config.json of a layout, read into our config and written from it, as the tables have it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba_core import architectures, tasks
from mamba_core.architectures.base import BaseConfig
from mamba_core.tasks.lm import HEAD
from mamba_core.weights import layouts, tables
from mamba_core.weights.formats import list_names
from mamba_core.weights.layouts import HIDDEN, Layout
from mamba_core.weights.names import Scheme
from mamba_core.weights.tables.base import ABSENT, Table
from mamba_core.weights.transforms import Shape

_SHADOWED = "extra"  # in the hidden object


def read_config(
    layout: str,
    fields: Mapping[str, Any],
    *,
    architecture: str | None = None,
    shapes: Mapping[str, Shape] | None = None,
    told: Mapping[str, Any] | None = None,
) -> BaseConfig:
    """A config from a library's fields, and where it saves none or not all, from the shapes of the tensors.

    Args:
        architecture: told by the fields unless given.
        shapes: by canonical name, for layouts that are sized by their tensors; None where there are no tensors.
        told: fields of our config that the file tells otherwise. Where the fields have them too, those count.

    Raises:
        TypeError: what should be a JSON object is none.
        ValueError: a field has a value that this architecture does not, or a shape does not tell its sizes.
    """
    shape = layouts.find(layout)
    name = tables.architecture_of(layout, fields) if architecture is None else architecture
    table, kind = tables.find(name, layout), architectures.find(name).Config
    rest = shape.flat(fields)
    _pop_fixed(rest, table)  # before a tensor is missing because of it
    _refuse_foreign(layout, name, rest)
    sizes = table.sizes(shapes) if shape.sized_by_tensors and shapes is not None else {}
    values = {"task": _pop_task(layout, name, rest)}
    for field in (*shape.kind_name, *shape.dtype, *table.unused):
        rest.pop(field, None)
    hidden, shadowed = _pop_hidden(shape, table, kind, rest)
    values |= _defaults(shape, table, kind) | sizes | dict(told or {})
    present = {ours: rest.pop(row.theirs) for ours, row in table.rows().items() if row.theirs in rest}
    stored, named = sizes.get("vocab_size"), present.get("vocab_size")
    if None not in (stored, named) and stored != named:  # the tensors have rows of padding, as the class makes them
        values["pad_vocab_size_multiple"] = kind.pad_vocab_size_multiple
    rows = present.get("vocab_size", values.get("vocab_size"))
    values = table.completed(values | present | hidden, rest, sizes)
    if shape.nested is not None and (unknown := sorted(field for field in rest if field.startswith(shape.nested))):
        names = list_names(field.removeprefix(f"{shape.nested}.") for field in unknown)
        raise ValueError(f"config has unknown fields in {shape.nested}: {names}")
    config = kind(**_typed(kind, values), extra=rest | shadowed)
    if shape.counts_rows and config.padded_vocab_size != rows:  # the library keeps our fields when it resizes
        config = dataclasses.replace(config, vocab_size=rows, pad_vocab_size_multiple=1)
    return config


def write_config(layout: str, config: BaseConfig) -> dict[str, Any]:
    """A config in a library's fields, and where its loader allows that, those that it does not have.

    Fields of `extra` that would mean something to the library are not written as they are.

    Raises:
        ValueError: the library cannot run a model of this config.
    """
    shape, table = layouts.find(layout), tables.find(config.architecture, layout)
    scheme = scheme_to_write(config, layout)
    _require(layout, config, {**table.required, **table.required_of.get(config.task, {})})
    if (reason := table.differs(config)) is not None:
        raise ValueError(f"the model cannot be written as {layout}: {reason}")
    rows = table.rows()
    written = {row.theirs: _written(row, getattr(config, ours)) for ours, row in rows.items()}
    if shape.counts_rows and "vocab_size" in rows:
        written[rows["vocab_size"].theirs] = config.padded_vocab_size
    written |= table.constants
    written |= dict.fromkeys(shape.kind_name if table.kinds else (), *table.kinds[:1])
    if shape.classes is not None and scheme.classes:
        written[shape.classes] = [scheme.classes[0]]
    written |= table.derived(config)
    hidden = written.pop(HIDDEN, {})
    if shape.nested is not None:
        for name in _plain_nested(shape, table, type(config), written):
            del written[name]
    if not shape.keeps_unknown:
        return shape.nest(written)
    hidden = _hidden(shape, table, config) | hidden
    taken = {*written, *_meaningful(layout, config.architecture)}
    if shape.shadows and (shadowed := {name: value for name, value in config.extra.items() if name in taken}):
        hidden[_SHADOWED] = shadowed
    extra = {name: value for name, value in config.extra.items() if name not in taken}
    return extra | shape.nest(written) | ({HIDDEN: hidden} if hidden else {})


def scheme_for(config: BaseConfig, layout: str) -> Scheme | None:
    """The names of a model of this config, None where the layout has no form for its task."""
    shape, table = layouts.find(layout), tables.find(config.architecture, layout)
    for scheme in table.schemes:
        if scheme.task == config.task and not scheme.as_is:
            return scheme
    if shape.holds_every_task and _has_outer_tensors(config, table.schemes[0]):
        return dataclasses.replace(table.schemes[0], task=config.task, classes=(), as_is=True)
    return None


def scheme_to_write(config: BaseConfig, layout: str) -> Scheme:
    """The same. Raises ValueError where there is none."""
    if (scheme := scheme_for(config, layout)) is not None:
        return scheme
    others = [name for name in tables.of(config.architecture) if scheme_for(config, name) is not None]
    expected = f"expected layout {' or '.join(others)}" if others else "no layout has a form for it"
    raise ValueError(f"a model of task {config.task!r} cannot be written as {layout}; {expected}")


# --- reading ---------------------------------------------------------------------------------------


def _pop_fixed(rest: dict[str, Any], table: Table) -> None:
    for name, allowed in table.fixed.items():
        if (value := rest.pop(name, None)) is not None and not any(value == only for only in allowed):
            reason = f": {table.reasons[name]}" if name in table.reasons else ""
            raise ValueError(f"config has {name}={value!r}; this version reads {name}={allowed[0]!r} only{reason}")


def _refuse_foreign(layout: str, architecture: str, fields: Mapping[str, Any]) -> None:
    if (claim := tables.claim_of_another(layout, architecture, fields)) is not None:
        name, other = claim
        raise ValueError(
            f"config has {name}={fields[name]!r}, which is of architecture {other!r}; as {architecture!r}, which it "
            "claims to be, it would be another function"
        )


def _pop_task(layout: str, architecture: str, rest: dict[str, Any]) -> str:
    """The task of the class that saved the model.

    Raises:
        ValueError: the class is not one of this architecture.
    """
    shape, table = layouts.find(layout), tables.find(architecture, layout)
    classes = table.classes()
    names = rest.pop(shape.classes, None) if shape.classes and classes else None
    if names is None or names == []:
        return table.schemes[0].task
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config has {shape.classes} {names!r}; expected a list of names")
    if unknown := [name for name in names if name not in classes]:
        owner = tables.owner_of(unknown[0])
        owned = f", a class of architecture {owner!r}" if owner not in (None, architecture) else ""
        raise ValueError(
            f"config has {shape.classes} {unknown[0]!r}{owned}; those of architecture {architecture!r} are "
            f"{', '.join(classes)}"
        )
    return classes[names[0]]


def _pop_hidden(
    shape: Layout, table: Table, kind: type[BaseConfig], rest: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our fields, unknown fields) of the hidden object."""
    if shape.hides == "never":
        return {}, {}
    hidden = rest.pop(HIDDEN, {})
    known = [*_hidden_names(shape, table, kind), *table.hides, "task_options"]
    known += ["task"] if shape.holds_every_task else []
    if not isinstance(hidden, Mapping) or not set(hidden) <= {*known, *((_SHADOWED,) if shape.shadows else ())}:
        raise ValueError(f"config has {HIDDEN} fields {hidden!r}; expected some of {', '.join(known)}")
    hidden = dict(hidden)
    if not isinstance(shadowed := hidden.pop(_SHADOWED, {}), Mapping):
        raise ValueError(f"config has {HIDDEN} fields with extra {shadowed!r}; expected a JSON object")
    if not isinstance(hidden.get("task_options", {}), Mapping):
        raise ValueError(f"config has {HIDDEN} fields with task_options {hidden['task_options']!r}; expected an object")
    return hidden, dict(shadowed)


def _defaults(shape: Layout, table: Table, kind: type[BaseConfig]) -> dict[str, Any]:
    defaults = {ours: row.default for ours, row in table.rows().items() if row.default is not ABSENT}
    if shape.counts_rows:
        defaults = {"vocab_size": kind.vocab_size, "pad_vocab_size_multiple": 1} | defaults
    return defaults


def _typed(kind: type[BaseConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The values, JSON's lists as tuples where the config has tuples."""
    tuples = {item.name for item in dataclasses.fields(kind) if isinstance(item.default, tuple)}
    return {
        name: tuple(value) if name in tuples and isinstance(value, list) else value for name, value in values.items()
    }


# --- writing ---------------------------------------------------------------------------------------


def _require(layout: str, config: BaseConfig, required: Mapping[str, Any]) -> None:
    for name, only in required.items():
        if (value := getattr(config, name)) != only:
            raise ValueError(f"{name}={value!r} cannot be written as {layout}, which has {only!r} only")


def _written(row, value: Any) -> Any:
    """The value in the type of the library's default, which transformers checks, where that does not change it."""
    if row.writes is not ABSENT:
        return row.writes
    if isinstance(value, tuple):
        return list(value)  # as JSON has it
    numbers = (int, float)
    if type(row.default) in numbers and type(value) in numbers and (alike := type(row.default)(value)) == value:
        return alike
    return value


def _plain_nested(shape: Layout, table: Table, kind: type[BaseConfig], written: Mapping[str, Any]) -> list[str]:
    """The names of nested fields that need not be written."""
    defaults = kind()
    plain = {row.theirs: _written(row, getattr(defaults, ours)) for ours, row in table.rows().items()}
    if table.assumed:
        plain |= dict.fromkeys(shape.kind_name, table.kinds[0])
    prefix = f"{shape.nested}."
    return [name for name, value in written.items() if name.startswith(prefix) and plain.get(name, ABSENT) == value]


def _hidden(shape: Layout, table: Table, config: BaseConfig) -> dict[str, Any]:
    if shape.hides == "never":
        return {}
    hidden = {name: getattr(config, name) for name in _hidden_names(shape, table, type(config))}
    if shape.hides == "changed":
        defaults = type(config)()
        hidden = {name: value for name, value in hidden.items() if value != getattr(defaults, name)}
    if shape.holds_every_task and config.task not in {scheme.task for scheme in table.schemes}:
        hidden["task"] = config.task
    return hidden | ({"task_options": dict(config.task_options)} if config.task_options else {})


def _hidden_names(shape: Layout, table: Table, kind: type[BaseConfig]) -> list[str]:
    """Our fields that the library has none for, or has another meaning for, without those that `derived` may hide."""
    rows = table.rows()
    otherwise = {ours for ours, row in rows.items() if row.writes is not ABSENT}
    if shape.counts_rows:
        otherwise.add("vocab_size")
    names = (item.name for item in dataclasses.fields(kind) if item.name not in tables.NOT_OF_TABLES)
    return [name for name in names if (name not in rows and name not in table.hides) or name in otherwise]


def _meaningful(layout: str, architecture: str) -> set[str]:
    """Names of fields that a reader of the layout, or of our own fields, would not take for unknown."""
    shape, table = layouts.find(layout), tables.find(architecture, layout)
    names = table.theirs() - set(table.ignored) | set(tables.foreign(layout, architecture))
    classes = () if shape.classes is None else (shape.classes,)
    return names | {*shape.dtype, *shape.kind_name, *classes, HIDDEN, "architecture"}


def _has_outer_tensors(config: BaseConfig, scheme: Scheme) -> bool:
    """Whether the model has the tensors outside its layers that the scheme names; the head may be missing."""
    task = tasks.of(config)
    own = {parameter.name for parameter in (*task.before(config), *task.after(config))}
    return {row.canonical for row in scheme.rows if "{" not in row.canonical} - {HEAD} <= own
