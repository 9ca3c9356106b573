"""What a checkpoint is: its layout and architecture, told from tensor names and the config together, and why.

The knowledge stands in `layouts` and `tables`; here it is only weighed.
"""

import os.path
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mamba_core import architectures, tasks
from mamba_core.weights import configs, layouts, tables
from mamba_core.weights.formats import CheckpointError, list_names
from mamba_core.weights.io import Checkpoint
from mamba_core.weights.names import EMBEDDING, HEAD, Scheme, templates
from mamba_core.weights.tables.base import Table

# Ends of names that no layout reads -> why.
_BITSANDBYTES = "quantised by bitsandbytes; save it dequantised"
_GPTQ = "quantised by GPTQ or AWQ; save it dequantised"
_UNREAD = dict.fromkeys((".SCB", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map"), _BITSANDBYTES)
_UNREAD |= dict.fromkeys((".qweight", ".qzeros", ".g_idx"), _GPTQ)
_UNREAD |= dict.fromkeys((".weight_scale", ".weight_packed", ".weight_scale_inv"), "quantised; save it dequantised")
_UNREAD[".scales"] = "quantised; save it dequantised"
_QUANT_STATE = re.compile(r"\.quant_state\b")
# Words of torch.compile, data parallelism and recomputation, wherever a wrapped module stands in a name; and the habit
# of `self.model = ...`.
_WORDS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INSIDE = re.compile(rf"(?<![^.])({'|'.join(_WORDS)})\.")
_WRAPPER = re.compile(rf"(?:{'|'.join((*_WORDS, 'model'))})\.")
# What wrappers keep beside a model: torch's AveragedModel counts.
_OF_WRAPPERS = ("n_averaged",)
MOST_WORDS = 8
_SHOWN = 3


class Detected(NamedTuple):
    """What a checkpoint is.

    names: the name that the scheme has -> the name in the file, of every tensor but those of wrappers. A head that the
        embedding is tied to has both their names where the file has the head alone.
    prefix: what a wrapper put before every name.
    of_wrappers: names of tensors that a wrapper keeps beside the model.
    evidence: a short sentence on how the layout was told.
    fits: whether the names are those of the scheme.
    """

    layout: str
    architecture: str
    table: Table
    scheme: Scheme
    names: Mapping[str, str]
    prefix: str
    of_wrappers: tuple[str, ...]
    evidence: str
    fits: bool


class _Names(NamedTuple):
    """A reading of a file's names: without a prefix that they share, and without the words of wrappers.

    own: name without those -> name in the file. words: what was taken out of the middle of names.
    """

    prefix: str
    words: tuple[str, ...]
    own: dict[str, str]


def detect(
    path: Path,
    fields: Mapping | None,
    checkpoint: Checkpoint,
    layout: str | None,
    compat: str | None = None,
    config_file: str = layouts.Layout.config_file,
) -> Detected:
    """The layout, the architecture and the scheme of names of a checkpoint.

    Args:
        fields: of the config, None where there is none.
        layout: the one that the user names, if one is named.
        compat: the architecture that the user names.
        config_file: the name of the config's file.

    Raises:
        CheckpointError: none fits, or several.
    """
    _refuse_quantised(path, checkpoint)
    _refuse(path, checkpoint, _UNREAD)
    by_config = [name for name in layouts.names() if fields is None or layouts.find(name).key(fields) is not None]
    names, fitting = _fitting(checkpoint, layout, by_config)
    evidence = []
    if layout is None:
        layout = _choose_layout(path, fields, by_config, fitting, checkpoint, compat, config_file)
        evidence = [_config_evidence(fields, layout, config_file)]
    schemes = fitting.get(layout, {})
    try:
        name = tables.architecture_of(layout, fields or {}, _closest(schemes, templates(names.own)), compat)
    except ValueError as fault:
        known = [table.schemes[0] for table in tables.holding(layout).values()]
        raise CheckpointError(f"{path}: {fault}{'' if schemes else f'; {described(checkpoint, known)}'}") from None
    table = tables.find(name, layout)
    _refuse(path, checkpoint, table.unread)
    scheme = schemes.get(name, table.schemes[0])
    own = names.own
    if name in schemes:
        evidence.append(f"tensors have {' and '.join(_marks_in(scheme, own))}")
        own = own | _tied(scheme, own)
    if names.prefix:
        evidence.append(f"every name begins with {names.prefix!r}")
    if names.words:
        evidence.append(f"names have {' and '.join(map(repr, names.words))} inside, which is left out")
    if layouts.find(layout).told_by_format and _is_marked(layout, checkpoint.metadata):
        evidence.append(f"the file says that {layouts.find(layout).metadata_format.upper()} wrote it")
    if fields is None and layouts.find(layout).sized_by_tensors:
        norm_eps = architectures.find(name).Config.norm_eps
        evidence.append(f"sizes are the tensors', the rest are defaults, norm_eps {norm_eps} among them")
    of_wrappers = tuple(name for name in checkpoint if name in _OF_WRAPPERS)
    told = "; ".join(evidence) or "the layout was named"
    return Detected(layout, name, table, scheme, own, names.prefix, of_wrappers, told, name in schemes)


def described(checkpoint: Collection[str], schemes: Collection[Scheme]) -> str:
    """Some names of a file, and some that were expected."""
    expected = dict.fromkeys(" and ".join(map(repr, scheme.marks)) for scheme in schemes if scheme.rows)
    some = list(expected)[:_SHOWN]
    return f"the file has {list_names(checkpoint, _SHOWN) or 'no tensor'}" + (
        f"; expected names such as {', or '.join(some)}" if some else ""
    )


def _fitting(
    names: Collection[str], layout: str | None, by_config: Collection[str]
) -> tuple[_Names, dict[str, dict[str, Scheme]]]:
    """The least change of the names behind which some scheme fits, and layout -> architecture -> its scheme.

    It is one of the layout's, or where none is named, of a layout that the config is of, or else of any. Where none
    fits, the prefix is all that wrappers may have put there.
    """
    first = None
    for reading in _readings(names):
        found = templates(reading.own)
        fitting = {}
        for each in layouts.names():
            schemes = {name: _scheme_of(each, table, found) for name, table in tables.holding(each).items()}
            fitting[each] = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        fitting = {each: schemes for each, schemes in fitting.items() if schemes}
        if any(name in fitting for name in (by_config if layout is None else [layout])):
            return reading, fitting
        if first is None and fitting and layout is None:
            first = reading, fitting
    if first is not None:
        return first
    prefix = "".join(_shared_wrappers(names))
    return _without(prefix, (), {name: name for name in names if name not in _OF_WRAPPERS}), {}


def _closest(schemes: Mapping[str, Scheme], found: Collection[str]) -> list[str]:
    """Of several architectures those whose schemes name the most of a file's tensors."""
    known = {name: len(scheme.templates.intersection(found)) for name, scheme in schemes.items()}
    return [name for name, count in known.items() if count == max(known.values())]


def _scheme_of(layout: str, table: Table, found: Collection[str]) -> Scheme | None:
    """The scheme of a table that fits names of these templates, and names the most of them.

    A head tells one with a head from one without. Where none fits, it may be that of a task which has something else in
    the place of the embedding.
    """
    fitting = [scheme for scheme in table.schemes if scheme.fits(found)]
    if not fitting and layouts.find(layout).holds_every_task and table.schemes[0].rows:
        others = [name for name in tasks.names() if tasks.find(name).Task.marks]
        fitting = [scheme for name in others if (scheme := configs.scheme_of_task(table, name)).fits(found)]
    named = [len(scheme.templates.intersection(found)) for scheme in fitting]
    fitting = [scheme for scheme, count in zip(fitting, named, strict=True) if count == max(named)]
    return next((scheme for scheme in fitting if scheme.has_head(found)), fitting[-1] if fitting else None)


def _tied(scheme: Scheme, own: Mapping[str, str]) -> dict[str, str]:
    """The embedding's name for the head of a file that has the head alone."""
    embedding, head = scheme.name(EMBEDDING), scheme.name(HEAD)
    if embedding is None or head is None or embedding in own or head not in own:
        return {}
    return {embedding: own[head]}


def _marks_in(scheme: Scheme, own: Mapping[str, str]) -> list[str]:
    embedding, head = scheme.name(EMBEDDING), scheme.name(HEAD)
    alone = embedding is not None and head is not None and bool(_tied(scheme, own))
    return [str(head) if alone and mark == embedding else mark for mark in scheme.marks]


def _choose_layout(
    path: Path,
    fields: Mapping | None,
    by_config: Collection[str],
    fitting: Mapping,
    checkpoint: Checkpoint,
    compat: str | None,
    config_file: str,
) -> str:
    both = [name for name in by_config if name in fitting or _names_itself(name, fields)]
    if compat is not None:
        both = [name for name in both if compat in fitting.get(name, tables.holding(name))] or both
    if fields is None:  # those that need none
        both = [name for name in both if layouts.find(name).sized_by_tensors] or both
    if len(both) > 1 and (marked := [name for name in both if _is_marked(name, checkpoint.metadata)]):
        both = marked
    elif len(both) > 1:
        both = [name for name in both if not layouts.find(name).told_by_format]
    if len(both) > 1 and fields is not None:
        both = [name for name in both if layouts.find(name).keys[0] in fields] or both
    if len(both) == 1:
        return both[0]
    config = f"{config_file} fits {' and '.join(by_config) or 'none'}"
    config = f"there is no {config_file}" if fields is None else config
    fits = f"{config}, the tensor names fit {' and '.join(fitting) or 'none'} of {', '.join(layouts.names())}"
    if len(both) > 1:
        raise CheckpointError(f"{path}: cannot tell the layout: {fits}; {_choices(both, fitting)}")
    schemes = [table.schemes[0] for name in by_config for table in tables.holding(name).values()]
    shown = "" if fitting else f"; {described(checkpoint, schemes)}"
    raise CheckpointError(
        f"{path}: cannot tell the layout: {fits}{_unknown_kind(fields, by_config)}{shown}; if you know it, name it "
        "(--from)"
    )


def _choices(names: Collection[str], fitting: Mapping) -> str:
    """How to name each of several layouts, and why it matters."""
    ways: list[str] = []
    reasons: dict[str, None] = {}
    for layout in names:
        for name, table in tables.holding(layout).items():
            if name not in fitting.get(layout, (name,)):
                continue
            shown = layout.replace("_", "-")
            way = f"layout={layout!r}", f"--from {shown}"
            if table.consent is not None:
                way = f"{way[0]}, compat={name!r}", f"{way[1]} --compat {name}"
                reasons[table.consent] = None
            ways.append(f"{way[0]} ({way[1]}) reads it as {name}")
    told = f", for {'; '.join(reasons)}" if reasons else ""
    return f"say which: {', and '.join(dict.fromkeys(ways))}{told}"


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


def _config_evidence(fields: Mapping | None, layout: str, config_file: str) -> str:
    return f"there is no {config_file}" if fields is None else f"{config_file} has {layouts.find(layout).key(fields)}"


def _refuse(path: Path, names: Collection[str], unread: Mapping[str, str]) -> None:
    for end, reason in unread.items():
        if found := next((name for name in names if name.endswith(end)), None):
            raise CheckpointError(f"{path}: has a tensor {found!r}: {reason}")


def _refuse_quantised(path: Path, names: Collection[str]) -> None:
    if found := next((name for name in names if _QUANT_STATE.search(name)), None):
        raise CheckpointError(f"{path}: has a tensor {found!r}: {_BITSANDBYTES}")


# --- wrappers --------------------------------------------------------------------------------------


def _readings(names: Collection[str]) -> Iterator[_Names]:
    """The names as they are, then without ever more words that all begin with, then without those inside too."""
    plain = {name: name for name in names if name not in _OF_WRAPPERS}
    for prefix in _prefixes(plain):
        yield _without(prefix, (), plain)
    cut = {_INSIDE.sub("", name): name for name in plain}
    if len(cut) == len(plain) and cut.keys() != plain.keys():
        words = tuple(dict.fromkeys(word for name in plain for word in _INSIDE.findall(name)))
        for prefix in _prefixes(cut):
            yield _without(prefix, words, cut)


def _without(prefix: str, words: tuple[str, ...], names: Mapping[str, str]) -> _Names:
    return _Names(prefix, words, {name.removeprefix(prefix): own for name, own in names.items()})


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """What all names begin with, in whole words, the shortest first: "", "net.", "net.backbone." and so on."""
    shared = os.path.commonprefix(list(names))  # noqa: RUF071  # of characters, then cut back to whole words
    words = shared.split(".", MOST_WORDS)[:-1] if len(names) > 1 else []
    for count in range(len(words) + 1):
        yield "".join(f"{word}." for word in words[:count])


def _shared_wrappers(names: Collection[str]) -> list[str]:
    """The words of wrappers that all names begin with."""
    words: list[str] = []
    for prefix in _prefixes([name for name in names if name not in _OF_WRAPPERS]):
        word = prefix.removeprefix("".join(words))
        if word and _WRAPPER.fullmatch(word):
            words.append(word)
        elif word:
            break
    return words
