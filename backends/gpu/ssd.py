"""How the kernels of `ssd_kernels` are launched: sizes, grids and what each array is, for every framework."""

from __future__ import annotations

import functools
from typing import NamedTuple

# Positions of a chunk, as `ssd_kernels.Q`.
CHUNK = 64
DTYPES = ("float32", "bfloat16", "float16")
# Of channels of a head and of states, padded to powers of 2; and of both together, by the bytes of a factor.
LARGEST_CHANNELS, LARGEST_STATES, LARGEST = 128, 256, {2: 2**14, 4: 2**13}
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


def reason(dtype: str | None, channels: int | None = None, states: int | None = None) -> str | None:
    """Why the kernels do not compute heads of so many channels and states; None if they do."""
    if dtype is not None and dtype not in DTYPES:
        return f"x is {dtype}, and it computes {', '.join(DTYPES)}"
    if channels is None or states is None:
        return None
    largest = LARGEST[2 if dtype == "bfloat16" else 4]
    if channels > LARGEST_CHANNELS or states > LARGEST_STATES or padded(channels) * padded(states) > largest:
        return (
            f"a head has {channels} channels and {states} states, and it holds at most {LARGEST_CHANNELS} and "
            f"{LARGEST_STATES}, and {largest} of both, each padded to a power of 2"
        )
    return None


def padded(size: int) -> int:
    return max(LEAST_PADDED, 1 << (size - 1).bit_length())


class Plan(NamedTuple):
    """Of one call. options: what every kernel is told as constants, by name."""

    batch: int
    length: int
    heads: int
    groups: int
    channels: int
    states: int
    chunks: int
    of_segment: int
    together: int

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.of_segment)

    @property
    def parts(self) -> int:
        """Programs that share the heads of a group in the gradient."""
        return self.heads // self.groups // self.together

    @property
    def blocks(self) -> int:
        """Programs that share the channels of a state between chunks."""
        return BLOCKS if padded(self.channels) == self.channels and self.channels >= BLOCKS * LEAST_BLOCK else 1

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "HEADS": self.heads,
            "OF_GROUP": self.heads // self.groups,
            "P": self.channels,
            "N": self.states,
            "PP": padded(self.channels),
            "NN": padded(self.states),
        }

    @property
    def state(self) -> tuple[int, int]:
        """The shape of a state as the kernels keep it between them."""
        return padded(self.states), padded(self.channels)


@functools.lru_cache(maxsize=1024)
def plan(batch: int, length: int, heads: int, groups: int, channels: int, states: int, multiprocessors: int) -> Plan:
    chunks = -(-length // CHUNK)
    return Plan(
        *(batch, length, heads, groups, channels, states, chunks),
        _of_segment(chunks, batch * heads, RESIDENT * multiprocessors),
        _together(heads // groups, batch * chunks * groups, multiprocessors),
    )


def _of_segment(chunks: int, rows: int, slots: int) -> int:
    """The chunks of a segment: rows of segments that fill the GPU cost more than one that does not."""

    def cost(segments):
        of_segment = -(-chunks // segments)
        waves = -(-rows * -(-chunks // of_segment) // slots)
        return waves * of_segment * (SEGMENT_COST if segments > 1 else 1.0)

    best = min(range(1, min(chunks, MOST_SEGMENTS) + 1), key=cost)
    return -(-chunks // best)


def _together(of_group: int, rows: int, slots: int) -> int:
    """The heads that a program of the gradient computes one after another."""

    def cost(together):
        return -(-rows * (of_group // together) // slots) * (together + PROGRAM_COST)

    return min((count for count in range(1, of_group + 1) if of_group % count == 0), key=cost)
