"""The recurrence of Mamba-2 on an NVIDIA GPU, as an operator: all of the op on the matrix units, in Triton.

The kernels are those of `mamba_core.backends.gpu.ssd_kernels`. The same inputs give the same bits.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mamba_core.backends.gpu import ssd as gpu
from mamba_core.backends.torch.kernels import triton
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents

# Where there is no GPU, as many as an H100 has.
MULTIPROCESSORS = 132
# Warps of a program, and loads that are on their way at once.
STATES = {"num_warps": 4, "num_stages": 3}
FORWARD = {"num_warps": 4, "num_stages": 2}
QUERIES = {"num_warps": 8, "num_stages": 3}
KEYS = {"num_warps": 8, "num_stages": 3}
# Triton 3.6 writes beyond its memory where eight warps share a smaller product.
LEAST_SHARED = 64


def reason(
    device: torch.device, dtype: torch.dtype | None, channels: int | None = None, states: int | None = None
) -> str | None:
    """Why these kernels cannot run on that device, for heads of so many channels and states; None if they can."""
    return triton.reason(device) or gpu.reason(
        None if dtype is None else str(dtype).removeprefix("torch."), channels, states
    )


def cuda(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0, mask, restart):
    """(y, final state)."""
    dtype = x.dtype
    if x.shape[1] == 0:
        return x, x.new_zeros(*_state_shape(x, B), dtype=torch.float32) if h0 is None else h0.float()
    if any(value is not None and value.dtype != dtype for value in (dt, B, C, z)):
        x, dt, B, C, z = (None if value is None else value.float() for value in (x, dt, B, C, z))
    A, D, dt_bias, h0 = (None if value is None else value.float() for value in (A, D, dt_bias, h0))
    tensors = (x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    y, h = _cuda(*tensors, bool(dt_softplus), *map(float, dt_limit))
    return y.to(dtype), h


@torch.library.custom_op("mamba_core::triton_ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    dt_softplus: bool,
    least: float,
    most: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, final state, what each segment adds, its decay): the last two are empty if there is one segment."""
    refuse_tangents(x, dt, A, B, C, D, z, dt_bias, h0)
    call = _Call(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, dt_softplus, least, most)
    return call.forward()


@torch.library.custom_op("mamba_core::triton_ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    added: Tensor,
    logs: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    dt_softplus: bool,
    least: float,
    most: float,
) -> list[Tensor]:
    """The gradient of every floating-point argument that was given, in their order."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, dt_softplus, least, most)
    return call.backward(dy, dfinal_state, added, logs)


@_ssd.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, dt_softplus, least, most):
    return x.new_empty(x.shape), A.new_empty(_state_shape(x, B)), *_empty_segments(_plan(x, B), A)


@_ssd_backward.register_fake
def _(dy, dfinal_state, added, logs, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_cuda = differentiable(_ssd, _ssd_backward, kept=(2, 3))


def _state_shape(x, B) -> tuple[int, int, int, int]:
    return x.shape[0], *x.shape[2:], B.shape[3]


def _plan(x, B) -> gpu.Plan:
    count = MULTIPROCESSORS
    if x.is_cuda:
        count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return gpu.plan(*x.shape[:3], B.shape[2], x.shape[3], B.shape[3], count)


def _empty_segments(plan: gpu.Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """float32: what each segment adds to a state, and the logarithm of its decay."""
    rows_ = (plan.batch, plan.heads, plan.segments) if plan.segments > 1 else (0, 0, 0)
    return like.new_empty(*rows_, *plan.state), like.new_empty(rows_)


class _Call:
    """The kernels of one call."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, dt_softplus, least, most):
        self.kernels = importlib.import_module("mamba_core.backends.gpu.ssd_kernels")
        sequences = (x, dt, B, C, z)
        self.x, self.dt, self.B, self.C, self.z = (None if value is None else _dense(value) for value in sequences)
        self.A, self.D, self.bias, self.h0 = (
            None if value is None else value.contiguous() for value in (A, D, dt_bias, h0)
        )
        self.mask, self.restart = (None if value is None else value.contiguous() for value in (mask, restart))
        self.softplus, self.limits = dt_softplus, (least, most)
        self.plan = _plan(x, B)
        precision = "widened" if triton.INTERPRETED else gpu.PRECISIONS[str(x.dtype).removeprefix("torch.")]
        self.exact = {"EXACT": x.dtype == torch.float32}
        # A product that is rounded in one place and not in another would not cancel.
        self.unfused = {"enable_fp_fusion": not self.exact["EXACT"]}
        self.of_steps = self.exact | {
            "HEADS": self.plan.heads,
            "SOFTPLUS": dt_softplus,
            "HAS_BIAS": dt_bias is not None,
            "HAS_MASK": mask is not None,
            "HAS_RESTART": restart is not None,
            "BLOCK": gpu.HEADS,
        }
        even = mask is None and x.shape[1] % gpu.CHUNK == 0
        positions = {"EVEN": even, "HAS_MASK": mask is not None, "PRECISION": precision}
        self.common = self.plan.sizes | self.exact | positions

    def forward(self):
        plan, x = self.plan, self.x
        y, final = x.new_empty(x.shape), self.A.new_empty(plan.batch, plan.heads, plan.channels, plan.states)
        added, logs = _empty_segments(plan, self.A)
        with triton.launching(x):
            decays = self._steps()
            if plan.segments > 1:
                self._adds(x, self.B, decays, added, logs, backward=False)
            self._forward(decays, added, logs, self.z, y, final)
        return y, final, added, logs

    def backward(self, dy, dfinal_state, added, logs):
        plan, x, new = self.plan, self.x, self.A.new_empty
        dy = _dense(dy)
        # The states between chunks are rounded as every factor of a product is.
        between = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        shape = (plan.batch, plan.chunks, plan.heads, *plan.state)
        before, after = (x.new_empty(shape, dtype=between) for _ in range(2))
        dx, ddt = x.new_empty(x.shape), self.dt.new_empty(self.dt.shape)
        dz = None if self.z is None else self.z.new_empty(self.z.shape)
        dh0 = new(plan.batch, plan.heads, plan.channels, plan.states)
        of_D = self._of_each_head()
        chunks = plan.batch * plan.chunks
        shares, skipped = new(chunks, 2, plan.heads), new(chunks, plan.heads, of_D)
        dA, dbias = (torch.empty_like(self.A) for _ in range(2))
        dD = None if self.D is None else torch.empty_like(self.D)
        dtype = x.dtype if plan.parts == 1 else torch.float32
        dB, dC = (x.new_empty(plan.parts, *self.B.shape, dtype=dtype) for _ in range(2))
        dC_started = dC if dtype == torch.float32 else new(dC.shape)
        passed = new(plan.batch, plan.heads, plan.chunks)
        grid = (plan.chunks, plan.heads // plan.together, plan.batch)
        with triton.launching(x):
            decays = self._steps()
            started, *by_position = (torch.empty_like(decays[0]) for _ in range(4))
            if dz is not None:
                linear, dlinear = (x.new_empty(x.shape) for _ in range(2))
                self._forward(decays, added, logs, None, linear, torch.empty_like(dh0))
                self.kernels.gates[(plan.chunks, plan.heads, plan.batch)](
                    *(linear, self.z, dy, self._or(self.mask), dz, dlinear, plan.length),
                    *(*_strides(self.z), *_strides(dy)),
                    **{name: value for name, value in self.common.items() if name not in ("OF_GROUP", "N", "NN")},
                )
                dy = dlinear
            dadded, dlogs = _empty_segments(plan, self.A)
            if plan.segments > 1:
                self._adds(dy, self.C, decays, dadded, dlogs, backward=True)
            dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
            self.kernels.states[(plan.heads * plan.blocks, plan.segments, 2 * plan.batch)](
                *(x, self.B, dy, self.C, self._or(self.mask), *decays, self._or(self.h0), added, logs),
                *(self._or(dfinal_state), dadded, dlogs, before, after, dh0),
                *(plan.length, plan.chunks, plan.of_segment),
                *(*_strides(x), *_strides(self.B), *_strides(dy), *_strides(self.C)),
                **self.common,
                BLOCKS=plan.blocks,
                SEGMENTS=plan.segments,
                HAS_BEGIN=self.h0 is not None,
                HAS_LAST=dfinal_state is not None,
                **STATES,
            )
            self.kernels.of_queries[grid](
                *(self.C, self._or(self.mask), *decays[1:], before, after, dy, dC_started, started, passed),
                *(plan.length, plan.chunks, *_strides(self.C), *_strides(dy)),
                **self.common,
                TOGETHER=plan.together,
                **QUERIES,
            )
            self.kernels.of_keys[grid](
                *(x, self.B, self.C, self._or(self.D), self._or(self.mask), *decays, after, dy, dC_started),
                *(dx, dB, dC, *by_position, skipped, plan.length, plan.chunks),
                *(*_strides(x), *_strides(self.B), *_strides(self.C), *_strides(dy)),
                **self.common,
                TOGETHER=plan.together,
                D_OF=of_D,
                **KEYS | ({} if min(plan.state) >= LEAST_SHARED else {"num_warps": 4}) | self.unfused,
            )
            self.kernels.of_steps[self._grid_of_steps()](
                *(self.dt, self.A, self._or(self.bias), self._or(self.mask), self._or(self.restart)),
                *(decays[0], started, passed, *by_position, ddt, shares),
                *(plan.length, *_strides(self.dt), *self.limits),
                **self.of_steps | self.unfused,
            )
            blocks = triton.blocks_of(plan.heads * max(1, of_D), gpu.HEADS)
            self.kernels.totals[(3 if of_D else 2, blocks)](
                *(shares, skipped, dA, dbias, self._or(dD), chunks), HEADS=plan.heads, D_OF=of_D, BLOCK=gpu.HEADS
            )
        dB, dC = (value.squeeze(0) if plan.parts == 1 else value.sum(0).to(x.dtype) for value in (dB, dC))
        found = [dx, ddt, dA, dB, dC]
        given = {"D": dD, "z": dz, "bias": dbias, "h0": dh0}
        return found + [value for name, value in given.items() if getattr(self, name) is not None]

    def _forward(self, decays, added, logs, z, y, last):
        plan = self.plan
        self.kernels.forward[(plan.heads, plan.segments, plan.batch)](
            *(self.x, self.B, self.C, self._or(self.D), self._or(z), self._or(self.mask)),
            *(*decays, self._or(self.h0), added, logs, y, last, plan.length, plan.chunks, plan.of_segment),
            *(*_strides(self.x), *_strides(self.B), *_strides(self.C), *_strides(z)),
            **self.common,
            SEGMENTS=plan.segments,
            D_OF=self._of_each_head(),
            HAS_BEGIN=self.h0 is not None,
            HAS_Z=z is not None,
            **FORWARD,
        )

    def _steps(self):
        """The step sizes, sums and rest of the decays' logarithms, (b, h, chunks * CHUNK) in float32."""
        plan = self.plan
        shape = (plan.batch, plan.heads, plan.chunks * gpu.CHUNK)
        decays = [self.A.new_empty(shape) for _ in range(3)]
        self.kernels.steps[self._grid_of_steps()](
            *(self.dt, self.A, self._or(self.bias), self._or(self.mask), self._or(self.restart), *decays),
            *(plan.length, *_strides(self.dt), *self.limits),
            **self.of_steps,
        )
        return decays

    def _grid_of_steps(self):
        return self.plan.chunks, triton.blocks_of(self.plan.heads, gpu.HEADS), self.plan.batch

    def _adds(self, x, B, decays, added, logs, backward):
        """What each segment adds to a state."""
        plan = self.plan
        self.kernels.adds[(plan.heads * plan.blocks, plan.segments, plan.batch)](
            *(x, B, self._or(self.mask), *decays, added, logs, plan.length, plan.chunks, plan.of_segment),
            *(*_strides(x), *_strides(B)),
            **self.common,
            BLOCKS=plan.blocks,
            SEGMENTS=plan.segments,
            BACKWARD=backward,
            **STATES,
        )

    def _or(self, value):
        """An array that is not there is not read; a pointer must be there."""
        return self.A if value is None else value

    def _of_each_head(self) -> int:
        """Of a head."""
        return 0 if self.D is None else self.D[0].numel()


def _dense(value: Tensor) -> Tensor:
    """The value with adjacent elements at each position. A slice of a wider array has them already."""
    expected, there = 1, []
    for size, stride in zip(reversed(value.shape[2:]), reversed(value.stride()[2:]), strict=True):
        there.append(size == 1 or stride == expected)
        expected *= size
    return value if all(there) else value.contiguous()


def _strides(value) -> tuple[int, int]:
    return (0, 0) if value is None else (value.stride(0), value.stride(1))
