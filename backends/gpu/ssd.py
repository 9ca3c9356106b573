"""How the kernels of `ssd_kernels` are launched: sizes, grids and what each array is, for every framework."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

# Positions of a chunk, as `ssd_kernels.Q`.
CHUNK = 64
DTYPES = ("float32", "bfloat16", "float16")
# Of channels of a head and of states, padded to powers of 2.
LARGEST_CHANNELS, LARGEST_STATES = 128, 256
# The bytes of a factor -> channels times states -> bytes of shared memory that a program then has at most.
SHARED = {2: {2**13: 112 * 1024, 2**14: 184 * 1024}, 4: {2**13: 227 * 1024}}
LEAST_PADDED = 16
# Heads of a program that computes step sizes.
HEADS = 16
# Programs that carry a state, of which a multiprocessor holds two at once; and what a segment costs beside its share.
RESIDENT, SEGMENT_COST = 2, 1.6
MOST_SEGMENTS = 32
# Programs that share a state where only states are computed, each with so many channels at least.
BLOCKS, LEAST_BLOCK = 2, 32
# What a program of the gradient costs beside its heads, in heads.
PROGRAM_COST = 2
# Of x's dtype, the precision in which matrix units multiply: bfloat16 as it is, float16 as TF32, which holds it and
# whose range it does not have, and float32 in three products of TF32.
PRECISIONS = {"float32": "tf32x3", "bfloat16": "tf32", "float16": "tf32"}
# Warps of a program, and loads that are on their way at once.
OPTIONS = {
    "adds": {"num_warps": 4, "num_stages": 3},
    "states": {"num_warps": 4, "num_stages": 3},
    "forward": {"num_warps": 4, "num_stages": 2},
    "of_queries": {"num_warps": 4, "num_stages": 2},
    "of_keys": {"num_warps": 8, "num_stages": 3},
}
# Triton 3.6 writes beyond its memory where eight warps share a smaller product.
LEAST_SHARED = 64
# Of x's dtype; all other arrays are float32, but the states between chunks.
ELEMENTS = ("y", "linear", "dlinear", "dx", "ddt", "dz")
BETWEEN = ("before", "after")
DECAYS = ("sizes", "sums", "rest")


def reason(dtype: str | None, channels: int | None, states: int | None, shared: int) -> str | None:
    """Why the kernels do not compute heads of so many channels and states; None if they do.

    shared: bytes of shared memory that a program can have.
    """
    if dtype is not None and dtype not in DTYPES:
        return f"x is {dtype}, and it computes {', '.join(DTYPES)}"
    needed = SHARED[2 if dtype in (None, "bfloat16") else 4]
    if channels is None or states is None:
        return _too_little(min(needed.values()), shared)
    together = padded(channels) * padded(states)
    if channels > LARGEST_CHANNELS or states > LARGEST_STATES or together > max(needed):
        return (
            f"a head has {channels} channels and {states} states, and it holds at most {LARGEST_CHANNELS} and "
            f"{LARGEST_STATES}, and {max(needed)} of both, each padded to a power of 2"
        )
    return _too_little(min(size for most, size in needed.items() if together <= most), shared)


def _too_little(needed: int, shared: int) -> str | None:
    if needed <= shared:
        return None
    return f"a program needs {needed // 1024} KiB of shared memory, and has {shared // 1024} here"


def padded(size: int) -> int:
    return max(LEAST_PADDED, 1 << (size - 1).bit_length())


class Launch(NamedTuple):
    """Of a kernel.

    grid: its first axis has the batch too, because the others are short.
    reads, writes: its arrays by name, in its order; one that was not given has no value.
    numbers: its other arguments, where a sequence's name stands for the strides of its first two axes.
    """

    kernel: str
    grid: tuple[int, int]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    numbers: tuple[int | str, ...]
    constants: dict
    options: dict


class Ssd(NamedTuple):
    """One call: x (b, l, h, p) of that dtype, with groups and states of B.

    given: which arrays there are, of D, z, bias, mask, restart, begin (the initial state) and last (the gradient of the
        final state).
    of_D: values of D a head.
    """

    batch: int
    length: int
    heads: int
    channels: int
    groups: int
    states: int
    dtype: str
    given: frozenset[str]
    of_D: int  # noqa: N815 (its name in the paper)
    softplus: bool
    limits: tuple[float, float]
    multiprocessors: int
    interpreted: bool = False

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    @property
    def of_segment(self) -> int:
        return _of_segment(self.chunks, self.batch * self.heads, RESIDENT * self.multiprocessors)

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.of_segment)

    @property
    def together(self) -> int:
        return _together(self.heads // self.groups, self.batch * self.chunks * self.groups, self.multiprocessors)

    @property
    def parts(self) -> int:
        """Programs that share the heads of a group in the gradient."""
        return self.heads // self.groups // self.together

    @property
    def exact(self) -> bool:
        return self.dtype == "float32"

    @property
    def state(self) -> tuple[int, int]:
        """The shape of a state as the kernels keep it between them."""
        return padded(self.states), padded(self.channels)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays that kernels write."""
        return _shapes(self)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        b, h, chunks = self.batch, self.heads, self.chunks
        sequence, outer = (b, self.length, h, self.channels), (b, h, self.channels, self.states)
        found = dict.fromkeys(("y", "linear", "dx", "dz", "dlinear"), sequence) | {"ddt": sequence[:3]}
        found |= dict.fromkeys((*DECAYS, "started", "inner", "leaving", "spanning"), (b, h, chunks * CHUNK))
        found |= dict.fromkeys(("final", "unread", "dbegin"), outer)
        if self.segments > 1:
            found |= dict.fromkeys(("added", "dadded"), (b, h, self.segments, *self.state))
            found |= dict.fromkeys(("logs", "dlogs"), (b, h, self.segments))
        found |= dict.fromkeys(("before", "after"), (b, chunks, h, *self.state))
        found |= {"passed": (b, h, chunks), "shares": (b * chunks, 2, h), "dA": (h,), "dbias": (h,)}
        if self.of_D:
            found |= {"skipped": (b * chunks, h, self.of_D), "dD": (h, self.of_D)}
        of_groups = (self.parts, b, self.length, self.groups, self.states)
        return found | dict.fromkeys(("dB", "dC", "dC_started"), of_groups)

    def dtype_of(self, name: str) -> str:
        half = name in ELEMENTS or (name in ("dB", "dC") and self.parts == 1)
        # The states between chunks are rounded as every factor of a product is.
        half = half or (name in BETWEEN and self.dtype == "bfloat16")
        return self.dtype if half else "float32"

    def forward(self) -> tuple[Launch, ...]:
        """Writes y, final and, for the gradient, added and logs."""
        return _launches(self, Ssd._forwards)

    def backward(self) -> tuple[Launch, ...]:
        """Reads dy, added and logs; writes the gradients, and with parts > 1 those of B and C in parts."""
        return _launches(self, Ssd._backwards)

    def _forwards(self) -> Iterator[Launch]:
        yield self._steps()
        if self.segments > 1:
            yield self._adds("x", "B", ("added", "logs"))
        yield self._forward("z", ("y", "final"))

    def _backwards(self) -> Iterator[Launch]:
        dy = "dlinear" if "z" in self.given else "dy"
        yield self._steps()
        if "z" in self.given:
            yield self._forward(None, ("linear", "unread"))
            constants = self._constants("HEADS", "P", "PP", "EVEN", "HAS_MASK", "EXACT", "PRECISION")
            reads, numbers = ("linear", "z", "dy", "mask"), (self.length, "z", "dy")
            grid = (self.chunks * self.batch, self.heads)
            yield Launch("gates", grid, reads, ("dz", "dlinear"), numbers, constants, {})
        if self.segments > 1:
            yield self._adds(dy, "C", ("dadded", "dlogs"), backward=True)
        yield self._states(dy)
        yield from self._of_chunks(dy)
        yield from self._of_steps()

    def _steps(self) -> Launch:
        constants = self._constants(*STEPS)
        reads = ("dt", "A", "bias", "mask", "restart")
        return Launch("steps", self._grid_of_steps(), reads, DECAYS, (self.length, "dt"), constants, {})

    def _adds(self, x: str, B: str, writes: tuple[str, str], backward: bool = False) -> Launch:
        constants = self._constants(*CARRIED) | {"BACKWARD": backward}
        numbers = (self.length, self.chunks, self.of_segment, x, B)
        return Launch(
            "adds", self._grid_of_states(1), (x, B, "mask", *DECAYS), writes, numbers, constants, OPTIONS["adds"]
        )

    def _states(self, dy: str) -> Launch:
        constants = self._constants(*CARRIED, "HAS_BEGIN", "HAS_LAST")
        numbers = (self.length, self.chunks, self.of_segment, "x", "B", dy, "C")
        reads = ("x", "B", dy, "C", "mask", *DECAYS, "begin", "added", "logs", "last", "dadded", "dlogs")
        writes = ("before", "after", "dbegin")
        return Launch("states", self._grid_of_states(2), reads, writes, numbers, constants, OPTIONS["states"])

    def _forward(self, z: str | None, writes: tuple[str, str]) -> Launch:
        constants = self._constants(*SIZES, "SEGMENTS", "D_OF", "HAS_BEGIN", "EVEN", "HAS_MASK", "EXACT", "PRECISION")
        constants |= {"HAS_Z": z is not None and z in self.given}
        reads = ("x", "B", "C", "D", z or "none", "mask", *DECAYS, "begin", "added", "logs")
        numbers = (self.length, self.chunks, self.of_segment, "x", "B", "C", z or "none")
        grid = (self.heads * self.batch, self.segments)
        return Launch("forward", grid, reads, writes, numbers, constants, OPTIONS["forward"])

    def _of_chunks(self, dy: str) -> Iterator[Launch]:
        constants = self._constants(*SIZES, "TOGETHER", "EVEN", "HAS_MASK", "EXACT", "PRECISION")
        grid = (self.chunks * self.batch, self.heads // self.together)
        reads, writes = ("C", "mask", *DECAYS[1:], *BETWEEN, dy), ("dC_started", "started", "passed")
        numbers = (self.length, self.chunks, "C", dy)
        yield Launch("of_queries", grid, reads, writes, numbers, constants, OPTIONS["of_queries"])
        options = OPTIONS["of_keys"] | self._unfused
        if min(self.state) < LEAST_SHARED:
            options |= {"num_warps": 4}
        reads = ("x", "B", "C", "D", "mask", *DECAYS, "after", dy, "dC_started")
        writes = ("dx", "dB", "dC", "inner", "leaving", "spanning", "skipped")
        numbers = (self.length, self.chunks, "x", "B", "C", dy)
        yield Launch("of_keys", grid, reads, writes, numbers, constants | {"D_OF": self.of_D}, options)

    def _of_steps(self) -> Iterator[Launch]:
        by_position = ("started", "passed", "inner", "leaving", "spanning")
        reads = ("dt", "A", "bias", "mask", "sizes", *by_position)
        constants = self._constants(*(name for name in STEPS if name != "HAS_RESTART"))
        yield Launch(
            *("of_steps", self._grid_of_steps(), reads, ("ddt", "shares"), (self.length, "dt")),
            *(constants, self._unfused),
        )
        grid = (3 if self.of_D else 2, -(-self.heads * max(1, self.of_D) // HEADS))
        constants = {"HEADS": self.heads, "D_OF": self.of_D, "BLOCK": HEADS}
        writes = ("dA", "dbias", "dD")
        yield Launch("totals", grid, ("shares", "skipped"), writes, (self.batch * self.chunks,), constants, {})

    def _grid_of_steps(self) -> tuple[int, int]:
        return self.chunks * self.batch, -(-self.heads // HEADS)

    def _grid_of_states(self, directions: int) -> tuple[int, int]:
        return self.heads * self._blocks * directions * self.batch, self.segments

    @property
    def _blocks(self) -> int:
        """Programs that share the channels of a state between chunks."""
        return BLOCKS if padded(self.channels) == self.channels and self.channels >= BLOCKS * LEAST_BLOCK else 1

    @property
    def _unfused(self) -> dict[str, bool]:
        """Fused, the same product would be rounded in one sum and not in another, and the two would not cancel."""
        return {"enable_fp_fusion": not self.exact}

    def _constants(self, *names: str) -> dict:
        masked = "mask" in self.given
        known = {
            "HEADS": self.heads,
            "OF_GROUP": self.heads // self.groups,
            "P": self.channels,
            "N": self.states,
            "PP": padded(self.channels),
            "NN": padded(self.states),
            "BLOCKS": self._blocks,
            "SEGMENTS": self.segments,
            "TOGETHER": self.together,
            "BLOCK": HEADS,
            "LEAST": self.limits[0],
            "MOST": self.limits[1],
            "SOFTPLUS": self.softplus,
            "D_OF": self.of_D,
            "HAS_BIAS": "bias" in self.given,
            "HAS_BEGIN": "begin" in self.given,
            "HAS_LAST": "last" in self.given,
            "HAS_MASK": masked,
            "HAS_RESTART": "restart" in self.given,
            "EVEN": not masked and self.length % CHUNK == 0,
            "EXACT": self.exact,
            "PRECISION": "widened" if self.interpreted else PRECISIONS[self.dtype],
        }
        return {name: known[name] for name in names}


@functools.lru_cache(maxsize=1024)
def _shapes(call: Ssd) -> dict[str, tuple[int, ...]]:
    return call._shapes()


@functools.lru_cache(maxsize=1024)
def _launches(call: Ssd, direction) -> tuple[Launch, ...]:
    """The host's time counts where a step is not captured: what a call launches is found once."""
    return tuple(direction(call))


SIZES = ("HEADS", "OF_GROUP", "P", "N", "PP", "NN")
CARRIED = (*SIZES, "BLOCKS", "SEGMENTS", "EVEN", "HAS_MASK", "EXACT", "PRECISION")
STEPS = ("HEADS", "LEAST", "MOST", "SOFTPLUS", "HAS_BIAS", "HAS_MASK", "HAS_RESTART", "EXACT", "BLOCK")


@functools.lru_cache(maxsize=1024)
def _of_segment(chunks: int, rows: int, slots: int) -> int:
    """The chunks of a segment: rows of segments that fill the GPU cost more than one that does not."""

    def cost(segments):
        of_segment = -(-chunks // segments)
        waves = -(-rows * -(-chunks // of_segment) // slots)
        return waves * of_segment * (SEGMENT_COST if segments > 1 else 1.0)

    best = min(range(1, min(chunks, MOST_SEGMENTS) + 1), key=cost)
    return -(-chunks // best)


@functools.lru_cache(maxsize=1024)
def _together(of_group: int, rows: int, slots: int) -> int:
    """The heads that a program of the gradient computes one after another."""

    def cost(together):
        return -(-rows * (of_group // together) // slots) * (together + PROGRAM_COST)

    return min((count for count in range(1, of_group + 1) if of_group % count == 0), key=cost)
