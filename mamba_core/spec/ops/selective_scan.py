"""The S6 recurrence (Gu and Dao 2023, arXiv:2312.00752, equations 2a, 2b and 4), one position at a time.

The discretisation is that of the published code: exp(delta A) for A and delta B for B. Written to be read beside the
paper. Every backend's `ops/selective_scan.py` must equal this file.
"""

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

LEAST = float(np.finfo(np.float32).min)


def selective_scan(
    x,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t;  y_t = (C_t h_t + D x_t) * silu(z_t).

    The contract is `mamba_core.selective_scan`; computed and returned in float64.
    """
    check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids)
    run = _Scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids)
    return (run.y, run.states[-1]) if return_final_state else run.y


def selective_scan_vjp(
    dy,
    dfinal_state,
    x,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    mask=None,
    segment_ids=None,
) -> dict[str, np.ndarray]:
    """Gradients of `selective_scan` from those of its output and (None for zero) of its final state.

    The state's gradient runs backwards, g_{t-1} = exp(delta_t A) g_t + C_{t-1} dy_{t-1}; every other gradient is
    a product with g_t. Returns one array per argument that was given, under the argument's name.
    """
    run = _Scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids)
    x, A, B, C, step = run.x, run.A, run.B, run.C, run.step
    dy = np.where(run.valid[..., None], float64(dy), 0.0)
    grads = {}
    if z is not None:
        grads["z"] = dy * run.linear * silu_derivative(float64(z))
        dy = dy * silu(float64(z))
    dx = np.zeros_like(x)
    if D is not None:
        grads["D"] = np.einsum("ble,ble->e", dy, x)
        dx += dy * float64(D)

    dA, dB, dC, dstep = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C), np.zeros_like(step)
    g = np.zeros_like(run.states[0]) if dfinal_state is None else float64(dfinal_state).copy()
    for t in reversed(range(x.shape[1])):
        before = np.where(run.restart[:, t, None, None], 0.0, run.states[t])
        decay = np.exp(step[:, t, :, None] * A)
        dC[:, t] = np.einsum("be,ben->bn", dy[:, t], run.states[t + 1])
        g += dy[:, t, :, None] * C[:, t, None, :]
        dlog_decay = g * decay * before
        dA += np.einsum("ben,be->en", dlog_decay, step[:, t])
        dB[:, t] = np.einsum("ben,be->bn", g, step[:, t] * x[:, t])
        gB = np.einsum("ben,bn->be", g, B[:, t])
        dstep[:, t] = np.einsum("ben,en->be", dlog_decay, A) + gB * x[:, t]
        dx[:, t] += gB * step[:, t]
        g = np.where(run.restart[:, t, None, None], 0.0, decay * g)

    ddelta = np.where(run.valid[..., None], dstep, 0.0)
    if delta_softplus:
        ddelta *= sigmoid(run.raw_step)
    if delta_bias is not None:
        grads["delta_bias"] = ddelta.sum((0, 1))
    if initial_state is not None:
        grads["initial_state"] = g
    return grads | {"x": dx, "delta": ddelta, "A": dA, "B": dB, "C": dC}


def selective_step(x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, state):
    """One position of `selective_scan`: arguments without the length axis, returns (y, new state)."""
    check_step(x, delta, A, B, C, D, z, delta_bias, state)
    expand = [None if value is None else np.asarray(value)[:, None] for value in (x, delta, B, C, z)]
    x, delta, B, C, z = expand
    run = _Scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, None, None)
    return run.y[:, 0], run.states[-1]


def check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids) -> None:
    """Check the arguments of `selective_scan`.

    Raises:
        TypeError: an argument is not an array, or not of real floating-point numbers, or `mask` is not boolean.
        ValueError: a shape does not fit, or the batch is empty.
    """
    batch, length, channels = shape_of("x", x, ("b", "l", "e"))
    _, states = shape_of("A", A, ("e", "n"))
    expect_rows("x", batch)
    if channels == 0 or states == 0:
        raise ValueError(f"x has {channels} channels and A {states} states; expected at least one of each")
    sequence = {"delta": delta, "z": z}
    for name, value in sequence.items():
        expect_shape(name, value, (batch, length, channels), "(b, l, e)")
    expect_shape("A", A, (channels, states), "(e, n)")
    for name, value in {"B": B, "C": C}.items():
        expect_shape(name, value, (batch, length, states), "(b, l, n)")
    for name, value in {"D": D, "delta_bias": delta_bias}.items():
        expect_shape(name, value, (channels,), "(e,)")
    expect_shape("initial_state", initial_state, (batch, channels, states), "(b, e, n)")
    check_positions(batch, length, mask, segment_ids)
    expect_floats({"x": x, "A": A, "B": B, "C": C, **sequence})


def check_step(x, delta, A, B, C, D, z, delta_bias, state) -> None:
    """Check the arguments of `selective_step`, which have no axis of positions."""
    batch, channels = shape_of("x", x, ("b", "e"))
    _, states = shape_of("A", A, ("e", "n"))
    expect_rows("x", batch)
    for name, value in {"delta": delta, "z": z}.items():
        expect_shape(name, value, (batch, channels), "(b, e)")
    expect_shape("A", A, (channels, states), "(e, n)")
    for name, value in {"B": B, "C": C}.items():
        expect_shape(name, value, (batch, states), "(b, n)")
    for name, value in {"D": D, "delta_bias": delta_bias}.items():
        expect_shape(name, value, (channels,), "(e,)")
    if state is None:
        raise ValueError("selective_step needs state=(b, e, n); start from zeros")
    expect_shape("state", state, (batch, channels, states), "(b, e, n)")
    expect_floats({"x": x, "delta": delta, "A": A, "B": B, "C": C, "z": z})


class _Scan:
    """One forward run with all that the gradient needs: the state before the first and after every position."""

    def __init__(self, x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids):
        x, A, B, C = (float64(value) for value in (x, A, B, C))
        # A rate of -inf forgets at any step but one of size zero, which is that of a position that does not count.
        A = np.maximum(A, LEAST)
        self.x, self.A, self.B, self.C = x, A, B, C
        batch, length, channels = x.shape
        self.valid = counting(np.shape(x), mask)
        self.restart = restarts(self.valid, segment_ids)
        self.raw_step = float64(delta) + (0.0 if delta_bias is None else float64(delta_bias))
        step = softplus(self.raw_step) if delta_softplus else self.raw_step
        # A masked position is a step of size zero: exp(0) keeps the state and nothing is added.
        self.step = step = np.where(self.valid[..., None], step, 0.0)

        h = np.zeros((batch, channels, A.shape[1])) if initial_state is None else float64(initial_state)
        self.states = [h]
        self.linear = np.zeros_like(x)
        for t in range(length):
            h = np.where(self.restart[:, t, None, None], 0.0, h)
            h = np.exp(step[:, t, :, None] * A) * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None, :]
            self.states.append(h)
            self.linear[:, t] = np.einsum("ben,bn->be", h, C[:, t])
        if D is not None:
            self.linear += float64(D) * x
        y = self.linear if z is None else self.linear * silu(float64(z))
        self.y = np.where(self.valid[..., None], y, 0.0)


# --- how tests draw arguments ------------------------------------------------------------------------------


OPTIONAL = ("D", "delta_bias", "initial_state", "z")
BOTH = ("mask", "segment_ids")
# A call each: dtype, length, channels, states, whether with the softplus, and what is given beside x, delta, A, B, C.
SAMPLES = (
    ("float32", 257, 20, 16, True, OPTIONAL, BOTH),
    ("float32", 7, 5, 8, False, (), ()),
    ("float32", 1, 33, 16, True, ("z", "initial_state"), ()),
    ("float32", 257, 9, 1, True, ("D", "delta_bias"), ("segment_ids",)),
    ("bfloat16", 257, 20, 16, True, OPTIONAL, ("segment_ids",)),
    ("float16", 7, 67, 8, False, ("D", "delta_bias", "z"), ("mask",)),
)


def draw(rng, choose, b: int, l: int) -> Drawn:
    """Each optional argument is present or not; step sizes are from 1e-6 to 20."""
    e, n, softplus_on = choose((1, 5, 8, 67)), choose((1, 2, 3, 7, 16, 33, 64)), choose((False, True))
    given = [name for name in OPTIONAL if choose((False, True))]
    return _draw(rng, b, l, e, n, softplus_on, given)


def samples(rng):
    for dtype, l, e, n, softplus_on, given, positions in SAMPLES:
        yield Sample(dtype, _draw(rng, 2, l, e, n, softplus_on, given), draw_positions(rng, 2, l, positions))


def _draw(rng, b, l, e, n, softplus_on, given) -> Drawn:
    arrays = {"x": rng.normal(size=(b, l, e)), "delta": draw_steps(rng, (b, l, e), softplus_on)}
    arrays |= {"A": -np.exp(rng.normal(size=(e, n))), "B": rng.normal(size=(b, l, n)), "C": rng.normal(size=(b, l, n))}
    shapes = {"D": (e,), "delta_bias": (e,), "initial_state": (b, e, n), "z": (b, l, e)}
    for name in given:
        # Without the softplus the sum must stay a positive step.
        positive = name == "delta_bias" and not softplus_on
        arrays[name] = rng.uniform(0, 1, shapes[name]) if positive else rng.normal(size=shapes[name])
    return Drawn(arrays, {"delta_softplus": softplus_on})


def draw_steps(rng, shape, softplus_on: bool) -> np.ndarray:
    """Log-uniform step sizes, before the softplus where there is one."""
    step = np.exp(rng.uniform(np.log(1e-6), np.log(20.0), shape))
    return step + np.log(-np.expm1(-step)) if softplus_on else step


def _magnitude(arrays, positions, options) -> float:
    signed = ("A", "delta", "delta_bias")
    absolute = {name: value if name in signed else np.abs(value) for name, value in arrays.items()}
    y = selective_scan(**absolute, **positions, **options)
    return np.linalg.norm(y) / np.sqrt(arrays["A"].shape[1])


OP = Op(
    name="selective_scan",
    forward=selective_scan,
    vjp=selective_scan_vjp,
    step=selective_step,
    per_position=("x", "delta", "B", "C", "z"),
    float32=("A", "D", "delta_bias", "initial_state", "final_state"),
    state_shape=lambda arrays: (arrays["x"].shape[0], *arrays["A"].shape),
    draw=draw,
    magnitude=_magnitude,
    samples=samples,
)

# --- in the block graph ------------------------------------------------------------------------------------

# The gate z is an input only where the scan applies it.
INPUTS = ("x", "delta", "B", "C", "z")


def _arguments(inputs, parameters, settings, carried, positions):
    named = dict(zip(INPUTS, inputs, strict=False))
    named |= {"A": -np.exp(parameters["A_log"]), "D": parameters["D"]}
    bias = parameters["delta_bias"] * settings.get("delta_bias_factor", 1)
    fixed = {"delta_bias": bias, "delta_softplus": True, "initial_state": carried[0] if carried else None}
    return named | fixed | positions._asdict()


def _forward(inputs, parameters, settings, carried, positions):
    arguments = _arguments(inputs, parameters, settings, carried, positions)
    y, state = selective_scan(**arguments, return_final_state=True)
    return y, (state,)[: len(carried)]


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    arguments = _arguments(inputs, parameters, settings, carried, positions)
    gradients = selective_scan_vjp(dy, dcarried[0] if carried else None, **arguments)
    named = {"A_log": gradients["A"] * arguments["A"], "D": gradients["D"]}
    named["delta_bias"] = gradients["delta_bias"] * settings.get("delta_bias_factor", 1)
    dentering = (gradients["initial_state"],) if carried else ()
    return [gradients[key] for key in INPUTS[: len(inputs)]], named, dentering


NODES = {"selective_scan": reversible(NodeOp(_forward, _vjp))}
