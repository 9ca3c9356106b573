"""What a checkpoint is: its layout and architecture, told from tensor names and config.json together, and why.

The knowledge stands in `layouts` and `tables`; here it is only weighed.
"""

import os.path
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mamba_core import architectures
from mamba_core.weights import layouts, tables
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import Checkpoint
from mamba_core.weights.names import Scheme, templates
from mamba_core.weights.tables.base import Table

# Ends of names that no layout reads -> why.
_QUANTISED = "quantised checkpoints are not read; dequantise it first"
_UNREAD = dict.fromkeys((".scales", ".qweight", ".absmax"), _QUANTISED)
MOST_WRAPPERS = 8


class Detected(NamedTuple):
    """prefix: what a wrapper put before every name. evidence: a short sentence on how the layout was told."""

    layout: str
    architecture: str
    table: Table
    scheme: Scheme
    prefix: str
    evidence: str


def detect(
    path: Path, fields: Mapping | None, checkpoint: Checkpoint, layout: str | None, compat: str | None = None
) -> Detected:
    """The layout, the architecture and the scheme of names of a checkpoint.

    Args:
        fields: of config.json, None where there is none.
        layout: the one that the user names, if one is named.
        compat: the architecture that the user names.

    Raises:
        CheckpointError: none fits, or several.
    """
    _refuse(path, checkpoint, _UNREAD)
    prefix, fitting = _fitting(checkpoint, layout)
    evidence = []
    if layout is None:
        layout = _choose_layout(path, fields, fitting, checkpoint.metadata)
        evidence = [_config_evidence(fields, layout)]
    schemes = fitting.get(layout, {})
    try:
        name = tables.architecture_of(layout, fields or {}, schemes, compat)
    except ValueError as fault:
        raise CheckpointError(f"{path}: {fault}") from None
    table = tables.find(name, layout)
    _refuse(path, checkpoint, table.unread)
    scheme = schemes.get(name, table.schemes[0])
    if name in schemes:
        evidence.append(f"tensors have {' and '.join(scheme.marks)}")
    if prefix:
        evidence.append(f"every name begins with {prefix!r}")
    if layouts.find(layout).told_by_format and _is_marked(layout, checkpoint.metadata):
        evidence.append(f"the file says that {layouts.find(layout).metadata_format.upper()} wrote it")
    if fields is None and layouts.find(layout).sized_by_tensors:
        norm_eps = architectures.find(name).Config.norm_eps
        evidence.append(f"sizes are the tensors', the rest are defaults, norm_eps {norm_eps} among them")
    return Detected(layout, name, table, scheme, prefix, "; ".join(evidence) or "the layout was named")


def _fitting(names: Collection[str], layout: str | None) -> tuple[str, dict[str, dict[str, Scheme]]]:
    """The shortest prefix behind which some scheme fits, and layout -> architecture -> its scheme.

    Where none fits, the prefix is all that wrappers may have put there.
    """
    prefix = ""
    for prefix in _prefixes(names, layout):
        found = templates([name.removeprefix(prefix) for name in names])
        fitting = {}
        for each in layouts.names():
            schemes = {name: _scheme_of(table, found) for name, table in tables.holding(each).items()}
            fitting[each] = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        fitting = {each: schemes for each, schemes in fitting.items() if schemes}
        if fitting if layout is None else layout in fitting:
            return prefix, fitting
    return prefix, {}


def _scheme_of(table: Table, found: Collection[str]) -> Scheme | None:
    """The scheme of a table that fits names of these templates. A head tells one with a head from one without."""
    fitting = [scheme for scheme in table.schemes if scheme.fits(found)]
    return next((scheme for scheme in fitting if scheme.has_head(found)), fitting[-1] if fitting else None)


def _choose_layout(path: Path, fields: Mapping | None, fitting: Mapping, metadata: Mapping[str, str]) -> str:
    by_config = [name for name in layouts.names() if fields is None or layouts.find(name).key(fields) is not None]
    both = [name for name in by_config if name in fitting or _names_itself(name, fields)]
    if len(both) > 1 and (marked := [name for name in both if _is_marked(name, metadata)]):
        both = marked
    elif len(both) > 1:
        both = [name for name in both if not layouts.find(name).told_by_format]
    if len(both) == 1:
        return both[0]
    config = "there is no config.json" if fields is None else f"config.json fits {' and '.join(by_config) or 'none'}"
    raise CheckpointError(
        f"{path}: cannot tell the layout: {config}, the tensor names fit {' and '.join(fitting) or 'none'} of "
        f"{', '.join(layouts.names())}{_unknown_kind(fields, by_config)}; if you know it, name it (--from)"
    )


def _names_itself(layout: str, fields: Mapping | None) -> bool:
    """Whether a config.json names an architecture whose tensors have their canonical names in this layout."""
    kind = layouts.find(layout).kind_of(fields or {})
    return any(kind in table.kinds and table.schemes[0].as_is for table in tables.holding(layout).values())


def _unknown_kind(fields: Mapping | None, by_config: Collection[str]) -> str:
    """What a config.json says that it is of, if no table is of that."""
    if fields is None:
        return ""
    for layout in by_config:
        try:
            tables.architecture_of(layout, fields)
        except ValueError as fault:
            return f"; {fault}"
    return ""


def _is_marked(layout: str, metadata: Mapping[str, str]) -> bool:
    shape = layouts.find(layout)
    return shape.told_by_format and metadata.get("format") == shape.metadata_format


def _config_evidence(fields: Mapping | None, layout: str) -> str:
    return "there is no config.json" if fields is None else f"config.json has {layouts.find(layout).key(fields)}"


def _refuse(path: Path, names: Collection[str], unread: Mapping[str, str]) -> None:
    for end, reason in unread.items():
        if found := next((name for name in names if name.endswith(end)), None):
            raise CheckpointError(f"{path}: has a tensor {found!r}: {reason}")


def _prefixes(names: Collection[str], layout: str | None) -> Iterator[str]:
    """What wrappers may have put before every name, the shortest first: "", "module.", "module.model." and so on."""
    wrappers = {word for name in layouts.names() if layout in (None, name) for word in layouts.find(name).wrappers}
    one = re.compile("|".join(map(re.escape, sorted(wrappers))))
    chain = re.compile(f"((?:{one.pattern})*).*", re.DOTALL)
    # Of characters, then cut back to whole words.
    shared = os.path.commonprefix([chain.sub(r"\1", name) for name in names])  # noqa: RUF071
    words = one.findall(chain.sub(r"\1", shared))
    for count in range(min(len(words), MOST_WRAPPERS) + 1):
        yield "".join(words[:count])
