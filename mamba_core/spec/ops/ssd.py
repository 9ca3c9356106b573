"""The recurrence of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, equations 1 and 2), one position at a time.

Every head h has one rate A_h, and its state is a matrix (p, n). Head j reads B and C of group j // (h / g). The
discretisation is that of the published code: exp(dt A) for A and dt B for B. Written to be read beside the paper. Every
backend's `ops/ssd.py` must equal this file.
"""

import math

import numpy as np

from mamba_core.spec.ops.base import (
    Drawn,
    NodeOp,
    Op,
    Sample,
    check_positions,
    counting,
    draw_positions,
    expect_floats,
    expect_rows,
    expect_shape,
    float64,
    restarts,
    reversible,
    shape_of,
    sigmoid,
    silu,
    silu_derivative,
    softplus,
)
from mamba_core.spec.ops.selective_scan import LEAST, draw_steps

NO_LIMIT = (0.0, math.inf)


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = (h_t C_t + D x_t) * silu(z_t).

    The contract is `mamba_core.ssd`; computed and returned in float64.
    """
    check_ssd(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, mask, segment_ids)
    run = _Run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, mask, segment_ids)
    return (run.y, run.states[-1]) if return_final_state else run.y


def ssd_vjp(
    dy,
    dfinal_state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
    initial_state=None,
    mask=None,
    segment_ids=None,
) -> dict[str, np.ndarray]:
    """Gradients of `ssd`, as `selective_scan_vjp` gives those of the scan."""
    run = _Run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, mask, segment_ids)
    x, A, B, C, step = run.x, run.A, run.B, run.C, run.step
    dy = np.where(run.valid[..., None, None], float64(dy), 0.0)
    grads = {}
    if z is not None:
        grads["z"] = dy * run.linear * silu_derivative(float64(z))
        dy = dy * silu(float64(z))
    dx = np.zeros_like(x)
    if D is not None:
        of_channels = np.einsum("blhp,blhp->hp", dy, x)
        grads["D"] = of_channels if np.ndim(D) == 2 else of_channels.sum(1)
        dx += dy * _per_channel(D)

    dA, dB, dC, dstep = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C), np.zeros_like(step)
    g = np.zeros_like(run.states[0]) if dfinal_state is None else float64(dfinal_state).copy()
    for t in reversed(range(x.shape[1])):
        restart = run.restart[:, t, None, None, None]
        before = np.where(restart, 0.0, run.states[t])
        decay = np.exp(step[:, t] * A)[..., None, None]
        dC[:, t] = np.einsum("bhp,bhpn->bhn", dy[:, t], run.states[t + 1])
        g += dy[:, t, :, :, None] * C[:, t, :, None, :]
        dlog_decay = (g * decay * before).sum((2, 3))
        dA += (dlog_decay * step[:, t]).sum(0)
        dB[:, t] = np.einsum("bhpn,bhp->bhn", g, step[:, t, :, None] * x[:, t])
        gB = np.einsum("bhpn,bhn->bhp", g, B[:, t])
        dstep[:, t] = dlog_decay * A + (gB * x[:, t]).sum(2)
        dx[:, t] += gB * step[:, t, :, None]
        g = np.where(restart, 0.0, decay * g)

    ddt = np.where(run.valid[..., None] & run.within, dstep, 0.0)
    if dt_softplus:
        ddt *= sigmoid(run.raw_step)
    if dt_bias is not None:
        grads["dt_bias"] = ddt.sum((0, 1))
    if initial_state is not None:
        grads["initial_state"] = g
    return grads | {"x": dx, "dt": ddt, "A": dA, "B": run.of_groups(dB), "C": run.of_groups(dC)}


def ssd_step(
    x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, dt_limit=NO_LIMIT, state
) -> tuple[np.ndarray, np.ndarray]:
    """One position of `ssd`: arguments without the length axis, returns (y, new state)."""
    check_ssd_step(x, dt, A, B, C, D, z, dt_bias, dt_limit, state)
    x, dt, B, C, z = (None if value is None else np.asarray(value)[:, None] for value in (x, dt, B, C, z))
    run = _Run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, None, None)
    return run.y[:, 0], run.states[-1]


def check_ssd(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, mask, segment_ids) -> None:
    """Check the arguments of `ssd`.

    Raises:
        TypeError: an argument is not an array, or not of real floating-point numbers, or `mask` is not boolean.
        ValueError: a shape does not fit, the batch is empty, or `dt_limit` is no pair of bounds.
    """
    batch, length, heads, channels = shape_of("x", x, ("b", "l", "h", "p"))
    groups, states = shape_of("B", B, ("b", "l", "g", "n"))[2:]
    expect_rows("x", batch)
    _check_sizes(heads, channels, groups, states)
    expect_shape("dt", dt, (batch, length, heads), "(b, l, h)")
    expect_shape("z", z, (batch, length, heads, channels), "(b, l, h, p)")
    for name, value in {"B": B, "C": C}.items():
        expect_shape(name, value, (batch, length, groups, states), "(b, l, g, n)")
    _check_of_heads(A, D, dt_bias, dt_limit, heads, channels)
    expect_shape("initial_state", initial_state, (batch, heads, channels, states), "(b, h, p, n)")
    check_positions(batch, length, mask, segment_ids)
    expect_floats({"x": x, "dt": dt, "A": A, "B": B, "C": C, "z": z})


def check_ssd_step(x, dt, A, B, C, D, z, dt_bias, dt_limit, state) -> None:
    """Check the arguments of `ssd_step`, which have no axis of positions."""
    batch, heads, channels = shape_of("x", x, ("b", "h", "p"))
    groups, states = shape_of("B", B, ("b", "g", "n"))[1:]
    expect_rows("x", batch)
    _check_sizes(heads, channels, groups, states)
    expect_shape("dt", dt, (batch, heads), "(b, h)")
    expect_shape("z", z, (batch, heads, channels), "(b, h, p)")
    for name, value in {"B": B, "C": C}.items():
        expect_shape(name, value, (batch, groups, states), "(b, g, n)")
    _check_of_heads(A, D, dt_bias, dt_limit, heads, channels)
    if state is None:
        raise ValueError("ssd_step needs state=(b, h, p, n); start from zeros")
    expect_shape("state", state, (batch, heads, channels, states), "(b, h, p, n)")
    expect_floats({"x": x, "dt": dt, "A": A, "B": B, "C": C, "z": z})


def _check_sizes(heads: int, channels: int, groups: int, states: int) -> None:
    if 0 in (heads, channels, groups, states):
        raise ValueError(
            f"x has {heads} heads of {channels} channels, and B {groups} groups of {states} states; expected at least "
            "one of each"
        )
    if heads % groups:
        raise ValueError(f"x has {heads} heads and B {groups} groups; expected a number of heads that they divide")


def _check_of_heads(A, D, dt_bias, dt_limit, heads: int, channels: int) -> None:
    shape_of("A", A, ("h",))
    expect_shape("A", A, (heads,), "(h,)")
    if D is not None and len(np.shape(D)) == 2:
        expect_shape("D", D, (heads, channels), "(h, p)")
    else:
        expect_shape("D", D, (heads,), "(h,)")
    expect_shape("dt_bias", dt_bias, (heads,), "(h,)")
    check_limit(dt_limit)


def check_limit(limit) -> None:
    """Raises ValueError for what is no pair of bounds of a step size, 0 <= least <= most."""
    if not (isinstance(limit, tuple | list) and len(limit) == 2 and all(map(is_bound, limit)) and limit[0] <= limit[1]):
        raise ValueError(f"dt_limit is {limit!r}; expected two numbers, 0 <= least <= most, where most may be infinite")


def is_bound(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


class _Run:
    """One forward run with all that the gradient needs: the state before the first and after every position.

    B and C are repeated here, an entry a head.
    """

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, mask, segment_ids):
        self.valid = counting(np.shape(x), mask)
        # What stands at a masked position may be NaN, and 0 * NaN is not 0.
        x, B, C = (np.where(self.valid[..., None, None], float64(value), 0.0) for value in (x, B, C))
        # As in `selective_scan`: exp(0 * -inf) is no number.
        A = np.maximum(float64(A), LEAST)
        batch, length, heads, channels = x.shape
        self.groups = B.shape[2]
        self.x, self.A = x, A
        self.B, self.C = (np.repeat(value, heads // self.groups, axis=2) for value in (B, C))
        self.restart = restarts(self.valid, segment_ids)
        self.raw_step = float64(dt) + (0.0 if dt_bias is None else float64(dt_bias))
        step = softplus(self.raw_step) if dt_softplus else self.raw_step
        # The gradient of a step beyond its limit is zero.
        self.within = (step >= dt_limit[0]) & (step <= dt_limit[1])
        # A masked position is a step of size zero: exp(0) keeps the state and nothing is added.
        self.step = step = np.where(self.valid[..., None], np.clip(step, *dt_limit), 0.0)

        h = np.zeros((batch, heads, channels, B.shape[3])) if initial_state is None else float64(initial_state)
        self.states = [h]
        self.linear = np.zeros_like(x)
        for t in range(length):
            h = np.where(self.restart[:, t, None, None, None], 0.0, h)
            u = step[:, t, :, None] * x[:, t]
            h = np.exp(step[:, t] * A)[..., None, None] * h + u[..., None] * self.B[:, t, :, None, :]
            self.states.append(h)
            self.linear[:, t] = np.einsum("bhpn,bhn->bhp", h, self.C[:, t])
        if D is not None:
            self.linear += _per_channel(D) * x
        y = self.linear if z is None else self.linear * silu(float64(z))
        self.y = np.where(self.valid[..., None, None], y, 0.0)

    def of_groups(self, gradient: np.ndarray) -> np.ndarray:
        """(b, l, g, n) from (b, l, h, n): the heads of a group read the same."""
        batch, length, heads, states = gradient.shape
        return gradient.reshape(batch, length, self.groups, heads // self.groups, states).sum(3)


def _per_channel(D) -> np.ndarray:
    """(h, p), or (h, 1) for one value a head."""
    D = float64(D)
    return D if D.ndim == 2 else D[:, None]


# --- how tests draw arguments ------------------------------------------------------------------------------


OPTIONAL = ("D", "dt_bias", "initial_state", "z")
BOTH = ("mask", "segment_ids")
LIMIT = (1e-3, 0.5)
# A call each: dtype, length, heads, channels, groups, states, whether with the softplus, the limit, whether D has a
# value a channel, and what is given beside x, dt, A, B, C.
SAMPLES = (
    ("float32", 257, 4, 16, 2, 32, True, NO_LIMIT, False, OPTIONAL, BOTH),
    ("float32", 7, 3, 5, 3, 7, False, LIMIT, False, (), ()),
    ("float32", 1, 2, 64, 1, 128, True, NO_LIMIT, False, ("z", "initial_state"), ()),
    ("float32", 300, 2, 64, 1, 128, True, LIMIT, True, OPTIONAL, ("segment_ids",)),
    ("bfloat16", 257, 4, 64, 1, 128, True, NO_LIMIT, False, OPTIONAL, ("segment_ids",)),
    ("float16", 70, 6, 8, 2, 16, False, NO_LIMIT, True, ("D", "dt_bias", "z"), ("mask",)),
)


def draw(rng, choose, b: int, l: int) -> Drawn:
    """Each optional argument is present or not; step sizes are from 1e-6 to 20."""
    g, of_group = choose((1, 2, 3)), choose((1, 2))
    p, n = choose((1, 5, 8, 33)), choose((1, 3, 8, 17))
    softplus_on, limit, per_channel = choose((False, True)), choose((NO_LIMIT, LIMIT)), choose((False, True))
    given = [name for name in OPTIONAL if choose((False, True))]
    return _draw(rng, b, l, g * of_group, p, g, n, softplus_on, limit, per_channel, given)


def samples(rng):
    for dtype, l, h, p, g, n, softplus_on, limit, per_channel, given, positions in SAMPLES:
        drawn = _draw(rng, 2, l, h, p, g, n, softplus_on, limit, per_channel, given)
        yield Sample(dtype, drawn, draw_positions(rng, 2, l, positions))


def _draw(rng, b, l, h, p, g, n, softplus_on, limit, per_channel, given) -> Drawn:
    arrays = {"x": rng.normal(size=(b, l, h, p)), "dt": draw_steps(rng, (b, l, h), softplus_on)}
    arrays |= {"A": -np.exp(rng.normal(size=h))}
    arrays |= {"B": rng.normal(size=(b, l, g, n)), "C": rng.normal(size=(b, l, g, n))}
    shapes = {"D": (h, p) if per_channel else (h,), "dt_bias": (h,), "initial_state": (b, h, p, n), "z": (b, l, h, p)}
    for name in given:
        # Without the softplus the sum must stay a positive step.
        positive = name == "dt_bias" and not softplus_on
        arrays[name] = rng.uniform(0, 1, shapes[name]) if positive else rng.normal(size=shapes[name])
    return Drawn(arrays, {"dt_softplus": softplus_on, "dt_limit": limit})


def _state_shape(arrays) -> tuple[int, ...]:
    batch, _, heads, channels = arrays["x"].shape
    return batch, heads, channels, arrays["B"].shape[3]


def _magnitude(arrays, positions, options) -> float:
    signed = ("A", "dt", "dt_bias")
    absolute = {name: value if name in signed else np.abs(value) for name, value in arrays.items()}
    return np.linalg.norm(ssd(**absolute, **positions, **options)) / np.sqrt(arrays["B"].shape[3])


OP = Op(
    name="ssd",
    forward=ssd,
    vjp=ssd_vjp,
    step=ssd_step,
    per_position=("x", "dt", "B", "C", "z"),
    float32=("A", "D", "dt_bias", "initial_state", "final_state"),
    state_shape=_state_shape,
    draw=draw,
    magnitude=_magnitude,
    samples=samples,
)

# --- in the block graph ------------------------------------------------------------------------------------

# Arrays of the graph have one axis of channels, (b, l, h * p) and (b, l, g * n). The gate z is an input only where the
# recurrence applies it. settings: heads, groups, and the limit of the step sizes.
INPUTS = ("x", "dt", "B", "C", "z")


def _arguments(inputs, parameters, settings, carried, positions):
    heads, groups = settings["heads"], settings["groups"]
    named = dict(zip(INPUTS, inputs, strict=False))
    for name, count in {"x": heads, "z": heads, "B": groups, "C": groups}.items():
        if name in named:
            value = named[name]
            named[name] = value.reshape(*value.shape[:2], count, value.shape[2] // count)
    D = parameters["D"]
    named |= {"A": -np.exp(parameters["A_log"]), "D": D if D.size == heads else D.reshape(heads, -1)}
    fixed = {"dt_bias": parameters["dt_bias"], "dt_softplus": True, "dt_limit": settings["dt_limit"]}
    return named | fixed | {"initial_state": carried[0] if carried else None} | positions._asdict()


def _forward(inputs, parameters, settings, carried, positions):
    y, state = ssd(**_arguments(inputs, parameters, settings, carried, positions), return_final_state=True)
    return y.reshape(inputs[0].shape), (state,)[: len(carried)]


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    arguments = _arguments(inputs, parameters, settings, carried, positions)
    gradients = ssd_vjp(dy.reshape(arguments["x"].shape), dcarried[0] if carried else None, **arguments)
    named = {"A_log": gradients["A"] * arguments["A"], "D": gradients["D"].reshape(parameters["D"].shape)}
    named["dt_bias"] = gradients["dt_bias"]
    given = [gradients[name].reshape(value.shape) for name, value in zip(INPUTS, inputs, strict=False)]
    return given, named, (gradients["initial_state"],) if carried else ()


NODES = {"ssd": reversible(NodeOp(_forward, _vjp))}
