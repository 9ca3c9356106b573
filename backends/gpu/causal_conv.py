"""The causal convolution's CUDA kernels, `causal_conv.cu`, without a framework: how they are laid out and called."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mamba_core.backends.gpu.launch import ELEMENTS, Launch, source

# A wider filter's inputs would not fit in registers.
WIDEST = 4
# Option -> the array that it stands for; SILU stands for none.
HAS = {"HAS_BIAS": "bias", "HAS_RESTART": "restart"}
OPTIONS = (*HAS, "SILU")

# Arrays that the kernels take, in their order.
INPUTS = ("x", "taps", "bias", "state", "restart")
LAUNCHES = {
    "conv_forward": (*INPUTS, "y", "final_state"),
    "conv_backward": (*INPUTS, "dy", "dfinal_state", "dx", "dstate", "sums"),
}

WARPS = 2
# Channels of a thread; more of them in the backward would not fit in registers.
VECTORS = {"conv_forward": 4, "conv_backward": 2}
# Positions that a thread walks along; half of them where its multiprocessor would have fewer threads than that.
STEPS = {"conv_forward": 32, "conv_backward": 64}
FEW_THREADS = 512


def options(arrays: Mapping[str, Any], silu: bool) -> frozenset[str]:
    """Those of OPTIONS that hold for arrays by the names of INPUTS, None where not given."""
    has = {option for option, name in HAS.items() if arrays.get(name) is not None}
    return frozenset(has | ({"SILU"} if silu else set()))


@dataclass(frozen=True)
class Conv:
    """A convolution as its kernels are made for it.

    rows, length, channels, width: b, l, e, k; none is 0, and 2 <= k <= WIDEST. Every array is contiguous and begins at
        a multiple of 16 bytes.
    dtype: of x, y, the states and their gradients; all others are float32.
    options: those of OPTIONS that hold.
    """

    rows: int
    length: int
    channels: int
    width: int
    dtype: str
    options: frozenset[str]
    multiprocessors: int
    backward: bool = False

    @property
    def kernel(self) -> str:
        return "conv_backward" if self.backward else "conv_forward"

    @property
    def vector(self) -> int:
        """Channels of a thread."""
        return math.gcd(self.channels, VECTORS[self.kernel])

    @property
    def chunk(self) -> int:
        """Positions whose outputs, or the gradients of whose inputs, are a thread's."""
        steps = STEPS[self.kernel]
        threads = self.rows * self.channels // self.vector * self.length // steps
        if threads < self.multiprocessors * FEW_THREADS:
            steps //= 2
        # An input's gradient is known with the last output that sees it.
        return steps - (self.width - 1) * self.backward

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with."""
        sizes = {"E": self.channels, "K": self.width, "CHANNELS": self.vector, "WARPS": WARPS}
        sizes |= {"ELEMENT": ELEMENTS[self.dtype]}
        return sizes | {name: int(name in self.options) for name in OPTIONS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the results; `sums` are over chunks, of the taps' gradients and after them the bias's."""
        state = (self.rows, self.width - 1, self.channels)
        sequence = (self.rows, self.length, self.channels)
        if not self.backward:
            return {"y": sequence, "final_state": state}
        sums = (self.rows, self.chunks, self.width + 1, self.channels)
        return {"dx": sequence, "dstate": state, "sums": sums}

    @property
    def launch(self) -> Launch:
        threads = 32 * WARPS
        count = self.rows * self.chunks * self.channels // self.vector
        return Launch(self.kernel, LAUNCHES[self.kernel], -(-count // threads), threads, 0, strided=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The integers that the kernel takes after its arrays, 32 bits each."""
        return self.rows, self.length, self.chunk, self.chunks


def conv_source() -> str:
    """The source in one piece."""
    return source("cuda.h", "causal_conv.cu")
