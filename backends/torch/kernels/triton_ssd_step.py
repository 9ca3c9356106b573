"""One position of a block whose recurrence is the ssd, in Triton: three kernels with few rows, five with some dozens.

They are in_proj with the norm before it and the convolution after it; the recurrence with the gate, which reads and
writes the state once; out_proj. With few rows the gated norm is taken with out_proj, which reads whole rows. Where it
has several groups, or comes before the gate, or there are more rows, it is a kernel of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton, triton_block, triton_gated_norm
from mamba_core.backends.torch.kernels.triton import (
    after_the_last,
    blocks_of,
    fetch,
    jit,
    launching,
    let_the_next_begin,
    overlapping,
    power_of_2,
    softplus,
    tl,
)
from mamba_core.backends.torch.quantization import Packed
from mamba_core.spec.ops.ssd import NO_LIMIT

# Entries of the state that a program and a warp of it hold, and programs that fill a GPU.
ENTRIES, OF_WARP, PROGRAMS = 4096, 1024, 512
# Floats of a line of the second cache.
LINE = 32


class Layer(NamedTuple):
    """The weights of a residual block; in_bias, conv_bias, gated_norm and out_bias may be None.

    in_proj gives gate and gated, z, x, B, C, dt; conv is (channels of x, B and C, k). D has a value a head or a
    channel. Without the gated norm there is the gate alone. Head j of `headdim` channels reads group
    j // (heads / groups). A group's channels are normed together.
    """

    norm: Tensor
    eps: float
    in_proj: Tensor | Packed
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gated_norm: Tensor | None
    out_proj: Tensor | Packed
    out_bias: Tensor | None
    headdim: int
    groups: int
    dt_limit: tuple[float, float]
    gated_eps: float
    norm_before_gate: bool

    @property
    def matrices(self) -> tuple[Tensor | Packed, ...]:
        """Those that are read as they lie in memory, in the dtype of the norm."""
        return self.in_proj, self.out_proj

    @property
    def scanned(self) -> int:
        """Channels of the recurrence."""
        return len(self.A_log) * self.headdim

    @property
    def inner(self) -> int:
        """Those and the channels beside them, which pass a gate instead."""
        return triton_block.size_of(self.out_proj)[1]

    @property
    def states(self) -> int:
        """States of a channel."""
        return (len(self.conv) - self.scanned) // (2 * self.groups)

    def reason(self) -> str | None:
        """Why `block` does not compute it; None if it does."""
        if not self._fits():
            return "its sizes do not fit each other"
        if self.states > ENTRIES:
            return f"a channel has {self.states} states, and it holds at most {ENTRIES}"
        if any(value.dtype not in triton.DTYPES for value in self if isinstance(value, Tensor)):
            return "its parameters have a dtype that it does not read"
        width = 0 if self.gated_norm is None else self.scanned // self.groups
        return triton_gated_norm.reason(self.norm.device, width)

    def _fits(self) -> bool:
        (d,), (h,), filters, e = self.norm.shape, self.A_log.shape, len(self.conv), self.scanned
        if h % self.groups or self.inner < e or self.states < 1 or filters != e + 2 * self.groups * self.states:
            return False
        rows = 2 * (self.inner - e) + e + filters + h
        vectors = {"dt_bias": h, "in_bias": rows, "conv_bias": filters, "gated_norm": e, "out_bias": d}
        given = {name: getattr(self, name) for name in vectors}
        fits = all(value is None or value.shape == (vectors[name],) for name, value in given.items())
        products = triton_block.size_of(self.in_proj), triton_block.size_of(self.out_proj)
        return fits and self.D.shape in ((h,), (e,)) and products == ((rows, d), (d, self.inner))

    def step(self, *arguments):
        return block(self, *arguments)


def block(layer: Layer, residual: Tensor, hidden: Tensor | None, conv_state, ssm_state, after, counters: Tensor):
    """The block of residual + hidden, (b, d) each: the residual stream, and the output that is still to be added to it.

    Either hidden may be None. The new conv_state (b, k-1, c) and ssm_state (b, h, p, n) are written to `after`, which
    may be the same two tensors. counters: see `triton_product.multiply`.
    """
    e, beside = layer.scanned, layer.inner - layer.scanned
    conv_after, ssm_after = after
    with launching(residual):
        places = conv_state, conv_after, counters, 2 * beside + e
        x, given, total = triton_block.enter(layer, residual, hidden, *places)
        z, dt = given[:, 2 * beside : 2 * beside + e], given[:, given.shape[1] - len(layer.A_log) :]
        joined = x.new_empty(len(x), layer.inner)
        if beside:
            torch.mul(F.silu(given[:, :beside]), given[:, beside : 2 * beside], out=joined[:, :beside])
        if layer.gated_norm is None or _norms_in_product(layer, x):
            _recurrence(layer, x, z, dt, ssm_state, ssm_after, joined[:, beside:], gates=True)
            norm = () if layer.gated_norm is None else (layer.gated_norm, layer.gated_eps)
            return triton_block.leave(layer, joined, total, counters, *norm)
        y = x.new_empty(len(x), e)
        _recurrence(layer, x, z, dt, ssm_state, ssm_after, y, gates=False)
        settings = layer.gated_norm, layer.groups, layer.gated_eps, layer.norm_before_gate
        triton_gated_norm.gate_and_norm(y, z, *settings, joined[:, beside:], overlap=True)
        return triton_block.leave(layer, joined, total, counters)


def _norms_in_product(layer, x):
    """Whether the gated norm is one of the whole rows that out_proj reads, after the gate."""
    whole = layer.groups == 1 and layer.inner == layer.scanned and not layer.norm_before_gate
    return whole and triton_block.takes_few(x)


def _recurrence(layer, x, z, dt, state, after, y, gates):
    b, heads, p, n = state.shape
    states = power_of_2(n)
    block = min(power_of_2(p), max(1, ENTRIES // states))
    while block > 1 and block * states > OF_WARP and b * heads * blocks_of(p, block) < PROGRAMS:
        block //= 2
    _ssd_step_kernel[(b * heads * blocks_of(p, block),)](
        x,
        z,
        dt,
        layer.dt_bias,
        layer.A_log,
        layer.D,
        state,
        after,
        y,
        *layer.dt_limit,
        z.stride(0),
        dt.stride(0),
        y.stride(0),
        HEADS=heads,
        CHANNELS=p,
        STATES=n,
        GROUPS=layer.groups,
        WIDE=len(layer.D) > heads,
        LIMITED=tuple(layer.dt_limit) != NO_LIMIT,
        GATES=gates,
        BLOCK=block,
        BLOCK_STATES=states,
        LINES=power_of_2(blocks_of(block * n, LINE)),
        LINE=LINE,
        num_warps=max(1, block * states // OF_WARP),
        **overlapping(),
    )


@jit
def _ssd_step_kernel(
    x,
    z,
    dt,
    dt_bias,
    A_log,
    D,
    state,
    after,
    y,
    least,
    most,
    z_stride,
    dt_stride,
    y_stride,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    LIMITED: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One position of the recurrence, h = exp(dt A) h + dt x B and y = h C + D x, for some channels of a head."""
    let_the_next_begin(OVERLAP)
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    FILTERS: tl.constexpr = HEADS * CHANNELS + 2 * GROUPS * STATES
    program = tl.program_id(0)
    first, head, b = program % BLOCKS * BLOCK, program // BLOCKS % HEADS, (program // (BLOCKS * HEADS)).to(tl.int64)
    p, n = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_STATES)
    own, inside = head * CHANNELS + p, p < CHANNELS
    within = inside[:, None] & (n < STATES)[None, :]
    cell = b * HEADS * CHANNELS * STATES + (own[:, None] * STATES + n[None, :])
    if OVERLAP:
        # It may be under way to the second cache while the kernel before still writes x: no value is read.
        line = tl.minimum(tl.arange(0, LINES) * LINE, tl.minimum(CHANNELS - first, BLOCK) * STATES - 1)
        fetch(state + b * HEADS * CHANNELS * STATES + (head * CHANNELS + first) * STATES + line)
    # As the plain form, which keeps exp(0 A) from being NaN.
    A = tl.maximum(-tl.exp(tl.load(A_log + head).to(tl.float32)), -3.4028234663852886e38, tl.PropagateNan.ALL)
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(D + own, mask=inside, other=0.0).to(tl.float32) if WIDE else tl.load(D + head).to(tl.float32)
    after_the_last(OVERLAP)
    h = tl.load(state + cell, mask=within, other=0.0)
    row = x + b * FILTERS
    of_group = row + HEADS * CHANNELS + head // (HEADS // GROUPS) * STATES + n
    u = tl.load(row + own, mask=inside, other=0.0).to(tl.float32)
    B = tl.load(of_group, mask=n < STATES, other=0.0).to(tl.float32)
    C = tl.load(of_group + GROUPS * STATES, mask=n < STATES, other=0.0).to(tl.float32)
    step = softplus(tl.load(dt + b * dt_stride + head).to(tl.float32) + bias)
    if LIMITED:
        step = tl.clamp(step, least, most, tl.PropagateNan.ALL)
    h = tl.exp(step * A) * h + (step * u)[:, None] * B[None, :]
    tl.store(after + cell, h, mask=within)
    value = tl.sum(h * C[None, :], 1) + skip * u
    if GATES:
        gate = tl.load(z + b * z_stride + own, mask=inside, other=0.0).to(tl.float32)
        value = value * gate * tl.sigmoid(gate)
    tl.store(y + b * y_stride + own, value.to(y.dtype.element_ty), mask=inside)
