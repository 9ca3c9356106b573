"""A case: a valid input with one or two of its files changed, and what is called with it. Its number says all of it."""

from random import Random
from typing import Any, NamedTuple

from mamba_core.weights import layouts
from mamba_core.weights.writing import WRITERS
from tests.campaign.heavy import heavy
from tests.campaign.inputs import Base, bases
from tests.campaign.mutations import npy, objects, raw, safetensors
from tests.campaign.mutations import zip as zips

# What is called, and how often of a thousand cases. What is slow is called less often.
ENTRIES = {"model": 330, "file": 430, "inspect": 15, "convert": 15, "cli": 10, "state": 60, "resume": 35, "tokens": 45,
           "tokenizer": 30, "chat": 8, "config": 22}  # fmt: skip
HEAVY_EVERY = 4000
SPECIAL_EVERY = 400


class Special(NamedTuple):
    """What stands where a file should: kind is "link", "fifo", "folder", "sparse" or "missing"."""

    kind: str
    value: Any = None


class Case(NamedTuple):
    """files: name -> what it is changed to. covered: a checksum, left as it was, covers all that was changed."""

    number: int
    base: Base
    entry: str
    kind: str
    files: dict[str, bytes | Special]
    covered: bool
    options: dict[str, Any]
    random: Random

    @property
    def nbytes(self) -> int:
        """The size of what is there to be read; a sparse file has nothing in it."""
        return sum(len(data) for data in (self.base.files | self.files).values() if not isinstance(data, Special))


def make(seed: int, number: int) -> Case:
    r = Random(seed * 1_000_003 + number)
    if number % HEAVY_EVERY == 7:
        kind, base, files, entry = heavy(r)
        return Case(number, base, entry, kind, files, False, dict(base.options), r)
    entry = r.choices(list(ENTRIES), list(ENTRIES.values()))[0]
    base = r.choice(_offering()[entry])
    options = dict(base.options) | _options(r) if entry in ("model", "inspect", "convert") else dict(base.options)
    if number % SPECIAL_EVERY == 3:
        name = r.choice(_changeable(base, entry))
        special = _special(r)
        return Case(number, base, entry, f"special.{special.kind}", {name: special}, False, options, r)
    files: dict[str, bytes | Special] = {}
    kinds, covered = [], []
    for name in r.sample(names := _changeable(base, entry), min(len(names), r.choice((1,) * 9 + (2,)))):
        kind, data, sealed = _edited(r, name, base)
        files[name] = data
        kinds.append(kind)
        covered.append(sealed)
    return Case(number, base, entry, " and ".join(kinds), files, all(covered), options, r)


def _offering(found: dict[str, list[Base]] = {}) -> dict[str, list[Base]]:  # noqa: B006  # made once
    if not found:
        found |= {entry: [base for base in bases().values() if entry in base.reads] for entry in ENTRIES}
    return found


def _changeable(base: Base, entry: str) -> list[str]:
    """The files that are read, those of weights more often than each of the others."""
    if entry == "file":
        weights = [
            name for name in base.files if _suffix(name) in ("safetensors", "bin", "pt", "pth", "npz", "index.json")
        ]
        return sorted(weights)
    return sorted(base.files)


def _options(r: Random) -> dict[str, Any]:
    """Now and then the layout or the architecture is named, seldom the right one."""
    chance = r.random()
    if chance < 0.04:
        return {"layout": r.choice(layouts.names())}
    return {"compat": r.choice(("minimamba", "mamba", "x"))} if chance < 0.05 else {}


def _edited(r: Random, name: str, base: Base) -> tuple[str, bytes, bool]:
    """(kind, bytes, whether a checksum that was left as it was covers the change) of a file."""
    data, suffix = base.files[name], _suffix(name)
    other = r.choice(_alike(suffix))
    if suffix in ("json", "index.json"):
        if r.random() < 0.06:
            return *raw.edited(r, data, other), False
        kind, text = objects.edited(r, data.decode(), other.decode())
        return kind, text.encode("utf-8", "surrogatepass"), False
    if suffix == "safetensors":
        return *safetensors.edited(r, data, other), False
    if suffix in ("bin", "pt", "pth", "npz"):
        return zips.edited(r, data, other)
    if suffix == "npy":
        return *npy.edited(r, data, other), False
    return *raw.edited(r, data, other), False


def _suffix(name: str) -> str:
    return "index.json" if name.endswith(".index.json") else name.rpartition(".")[2]


def _alike(suffix: str, found: dict[str, list[bytes]] = {}) -> list[bytes]:  # noqa: B006  # made once
    """The files of one kind, to splice with."""
    if suffix not in found:
        found[suffix] = [
            data for base in bases().values() for name, data in base.files.items() if _suffix(name) == suffix
        ]
    return found[suffix]


def _special(r: Random) -> Special:
    return r.choice(
        (
            *(Special("link", "."), Special("link", "nowhere"), Special("link", "/dev/null"), Special("link", "SELF")),
            *(Special("link", "/dev/zero"), Special("link", "SECRET"), Special("fifo"), Special("folder")),
            *(Special("sparse", 2**30), Special("missing"), Special("missing"), Special("missing")),
        )
    )


# What `convert` is asked to write.
FORMATS = (None, None, *sorted(WRITERS))
