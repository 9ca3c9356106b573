"""The selective scan's GPU kernels, without a framework: how they are compiled, laid out over a GPU and called.

`selective_scan.h` is the algorithm, in what CUDA C++ and Metal have in common. A framework describes a `Scan`,
allocates what its `Launch`es name, and launches them in order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent
ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}
LARGEST_STATE = 256

# Arrays that the kernels take, in their order.
SEQUENCES = ("x", "delta", "B", "C", "z", "dy")
INPUTS = (*SEQUENCES, "A", "D", "delta_bias", "begin", "mask", "restart")
FIRST_RESULTS = ("added", "total")
FORWARD_RESULTS = ("y", "final_state", "kept")
BACKWARD_RESULTS = ("dx", "ddelta", "dz", "dBC", "dA", "dD", "ddelta_bias", "dstate")
COMBINED = ("A", "begin", "total", "added")
PARTS = ("dBC", "dA", "dD", "ddelta_bias")
SUMS = ("dB_sum", "dC_sum", "dA_sum", "dD_sum", "ddelta_bias_sum")
# Option -> the array that it stands for; SOFTPLUS stands for none.
HAS = {"HAS_D": "D", "HAS_Z": "z", "HAS_BIAS": "delta_bias", "HAS_STATE": "begin"}
HAS |= {"HAS_MASK": "mask", "HAS_RESTART": "restart"}
OPTIONS = (*HAS, "SOFTPLUS")


def options(arrays: Mapping[str, Any], delta_softplus: bool) -> frozenset[str]:
    """Those of OPTIONS that hold for arrays by the names of INPUTS, None where not given."""
    given = {option for option, name in HAS.items() if arrays.get(name) is not None}
    return frozenset(given | ({"SOFTPLUS"} if delta_softplus else set()))


class Geometry(NamedTuple):
    """NS states a thread, S threads a channel, K channels a thread; positions a tile. See selective_scan.h."""

    NS: int
    S: int
    K: int
    WARPS: int
    TILE: int

    @property
    def threads(self) -> int:
        return 32 * self.WARPS

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.WARPS * 32 // self.S * self.K

    @property
    def padded(self) -> int:
        """States, with those that only fill up a thread's."""
        return self.NS * self.S

    @property
    def vector(self) -> int:
        """Elements that a thread reads at a time."""
        return min(8, self.TILE * self.K // self.S)

    @property
    def forward_shared(self) -> int:
        """Bytes of shared memory of a block in the forward."""
        return 4 * (3 * self._rows + 2 * self.TILE * self.padded + self.TILE)

    @property
    def backward_shared(self) -> int:
        history, sums = self.TILE * self.K * self.NS * self.threads, self.TILE * self.WARPS * 2 * self.padded
        own = 2 * self.threads * self.vector
        return 4 * (history + own + 6 * self._rows + 2 * self.TILE * self.padded + sums + self.TILE)

    @property
    def backward_first_shared(self) -> int:
        return 4 * (3 * self._rows + self.TILE * self.padded + self.TILE)

    @property
    def _rows(self) -> int:
        return self.TILE * (self.channels + 8)


# Positions between the states that the forward keeps for the backward, which begins its tiles from them.
KEEP_EVERY = 16
# Bytes of shared memory of a block on Apple's GPUs, and the states that they hold.
SMALL_SHARED, LARGEST_SMALL_STATE = 32 * 1024, 128
# The fewest positions that are worth a chunk of their own.
SHORTEST_CHUNK = 128
# The blocks of each multiprocessor where sequences are cut into chunks. Where each has a block of whole sequences to
# compute, chunks would cost more than they gain.
BLOCKS_A_MULTIPROCESSOR = 6


def geometry(states: int, backward: bool = False, small: bool = False) -> Geometry:
    """The geometry for up to that many states: the fastest on an H200, or with `small` one that SMALL_SHARED holds.

    Raises:
        ValueError: more states than LARGEST_STATE, or LARGEST_SMALL_STATE.
    """
    largest = LARGEST_SMALL_STATE if small else LARGEST_STATE
    if states > largest:
        raise ValueError(f"d_state is {states}; the GPU kernels hold at most {largest}")
    if small:
        return _small_geometry(states)
    if states > 128:
        return Geometry(NS=16, S=16, K=1, WARPS=2, TILE=KEEP_EVERY)
    S = 1 << (max(4, -(-states // 4)) - 1).bit_length()
    NS = 4 if states > 8 else 2 if states > 4 else 1
    K = 1 if S < 16 else 2
    return Geometry(NS, S, K, WARPS=4 // K, TILE=KEEP_EVERY if backward else 2 * KEEP_EVERY)


def _small_geometry(states: int) -> Geometry:
    S = 1 << (max(4, -(-states // 4)) - 1).bit_length()
    NS = 4 if states > 8 else 2 if states > 4 else 1
    sizes = [(tile, warps) for tile in (8, 4) for warps in (2, 1)]
    fitting = (Geometry(NS, S, max(1, S // tile), warps, tile) for tile, warps in sizes)
    return next(g for g in fitting if max(g.forward_shared, g.backward_shared) <= SMALL_SHARED)


@dataclass(frozen=True)
class Scan:
    """A scan as its kernels are made for it.

    rows, length, channels, states: b, l, e, n.
    dtype: of x, delta, B, C, z and y.
    options: those of OPTIONS that hold; HAS_STATE says whether there is a state to begin from, in the backward a
        gradient of the final state.
    aligned, states_aligned: whether the arrays x, delta, z and dy, or B and C, begin at multiples of 16 bytes and their
        positions at multiples of 8 elements.
    keep: whether the forward keeps the states that a backward needs.
    small: whether a block has no more than SMALL_SHARED bytes of shared memory.
    """

    rows: int
    length: int
    channels: int
    states: int
    dtype: str
    options: frozenset[str]
    aligned: bool
    states_aligned: bool
    multiprocessors: int
    keep: bool = False
    backward: bool = False
    small: bool = False

    @property
    def geometry(self) -> Geometry:
        return geometry(self.states, self.backward, self.small)

    @property
    def keep_every(self) -> int:
        """Positions between the states that the forward keeps: a tile of the backward's."""
        return geometry(self.states, True, self.small).TILE

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def chunk(self) -> int:
        """Positions of a chunk: all of them where rows and channels fill the GPU.

        Chunks need a second run, which costs a third of the main one.
        """
        blocks = max(self.rows * self.blocks, 1)
        count = min(self.multiprocessors * BLOCKS_A_MULTIPROCESSOR // blocks, self.length // SHORTEST_CHUNK)
        if blocks >= self.multiprocessors or count < 3:
            return max(self.length, 1)
        step = 2 * self.keep_every
        return -(-self.length // count // step) * step

    @property
    def blocks(self) -> int:
        """Blocks that share out the channels."""
        return -(-self.channels // self.geometry.channels)

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with."""
        g = self.geometry
        flags = {name: int(name in self.options) for name in OPTIONS}
        return {
            **g._asdict(),
            **flags,
            "ELEMENT": ELEMENTS[self.dtype],
            "KEEP_EVERY": self.keep_every,
            "ALIGNED": int(self.aligned and self.channels % g.vector == 0),
            "STATES_ALIGNED": int(self.states_aligned and self.states % min(8, g.padded) == 0),
            "CHUNKED": int(self.chunks > 1),
            "KEEP": int(self.keep),
            "BACKWARD": int(self.backward),
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the results and of what lies between two kernels, all float32 but y, dx, ddelta and dz."""
        b, l, e, padded, chunks = self.rows, self.length, self.channels, self.geometry.padded, self.chunks
        between = {"added": (b, chunks, e, padded), "total": (b, chunks, e)} if chunks > 1 else {}
        if not self.backward:
            kept = (b, -(-l // self.keep_every), e, padded) if self.keep else (0,)
            return between | {"y": (b, l, e), "final_state": (b, e, padded), "kept": kept}
        sums = {"dBC": (b, self.blocks, l, 2, padded), "dA": (b, chunks, e, padded), "dD": (b, chunks, e)}
        sequences = dict.fromkeys(("dx", "ddelta", "dz"), (b, l, e))
        return between | sequences | sums | {"ddelta_bias": (b, chunks, e), "dstate": (b, e, padded)}

    @property
    def launches(self) -> list["Launch"]:
        """The kernels in their order."""
        g, name = self.geometry, "backward" if self.backward else "forward"
        grid = self.blocks * self.chunks * self.rows
        shared = g.backward_shared if self.backward else g.forward_shared
        chunked = self.chunks > 1
        main = Launch(name, _SIGNATURES[name], grid, g.threads, shared, begins_from_added=chunked)
        if not chunked:
            return [main]
        shared = g.backward_first_shared if self.backward else g.forward_shared
        first = Launch(f"{name}_first", _SIGNATURES[f"{name}_first"], grid, g.threads, shared)
        combined = -(-self.rows * self.channels * g.padded // g.threads)
        return [first, Launch("combine_chunks", COMBINED, combined, g.threads, 0, strided=False), main]

    @property
    def adding_up(self) -> "Launch":
        """The kernel that sums PARTS over blocks, rows and chunks after a backward.

        A framework that forms these sums otherwise does not launch it.
        """
        e, padded = self.channels, self.geometry.padded
        count = self.rows * self.length * padded // 2 + e * padded + 2 * e
        threads = self.geometry.threads
        return Launch("add_up_sums", _SIGNATURES["add_up_sums"], -(-count // threads), threads, 0, strided=False)

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """The shapes of SUMS; the first two have the dtype of x."""
        e, n = self.channels, self.states
        return dict(zip(SUMS, (*[(self.rows, self.length, n)] * 2, (e, n), (e,), (e,)), strict=True))

    def sizes(self, launch: "Launch") -> tuple[int, ...]:
        """The integers that the kernel takes after its arrays, before the strides."""
        if launch.strided:
            return self.length, self.channels, self.states, self.chunk, self.chunks
        length = (self.length,) if launch.kernel == "add_up_sums" else ()
        return self.rows, *length, self.channels, self.states, self.chunks


class Launch(NamedTuple):
    """kernel: its name in the source.

    arrays: names of what it takes, in order. Then come `Scan.sizes`, 32 bits each, and if `strided` row and position
        stride of each of SEQUENCES, in elements, 64 bits each.
    begins_from_added: whether its "begin" is what the kernels before it left in "added".
    shared: bytes of shared memory that the launch asks for.
    """

    kernel: str
    arrays: tuple[str, ...]
    blocks: int
    threads: int
    shared: int
    strided: bool = True
    begins_from_added: bool = False


_SIGNATURES = {
    "forward_first": (*INPUTS, *FIRST_RESULTS),
    "forward": (*INPUTS, *FORWARD_RESULTS),
    "backward_first": (*INPUTS, *FIRST_RESULTS),
    "backward": (*INPUTS, "kept", *BACKWARD_RESULTS),
    "combine_chunks": COMBINED,
    "add_up_sums": (*PARTS, *SUMS),
}
_SIZES = {"combine_chunks": 4, "add_up_sums": 5}


def parameters(kernel: str) -> str:
    """The kernel's parameters as `struct` writes them: pointers, 32-bit sizes, 64-bit strides."""
    strides = 0 if kernel in _SIZES else 2 * len(SEQUENCES)
    return "P" * len(_SIGNATURES[kernel]) + "i" * _SIZES.get(kernel, 5) + "q" * strides


def source(prelude: str = "cuda.h", *files: str) -> str:
    """The source in one piece."""
    own = files or ("selective_scan.h", "selective_scan.cu")
    return "\n".join((SOURCES / name).read_text() for name in (prelude, "elements.h", *own))
