"""h_t[i, j] = a^(i+1) h_{t-1}[i, j] + (j+1) x_t with a = sigmoid(decay), i < 2, j < 3; y_t is the sum of h_t."""

import numpy as np

from mamba_core.spec.ops.base import (
    Drawn,
    NodeOp,
    Op,
    check_positions,
    counting,
    expect_floats,
    expect_rows,
    expect_shape,
    float64,
    restarts,
    shape_of,
    sigmoid,
)

POWERS, FACTORS = np.array([1.0, 2.0]), np.array([1.0, 2.0, 3.0])


def check_sum(x, decay, initial_state, mask, segment_ids):
    batch, length, channels = shape_of("x", x, ("b", "l", "e"))
    expect_rows("x", batch)
    expect_shape("decay", decay, (channels,), "(e,)")
    expect_shape("initial_state", initial_state, (batch, channels, 2, 3), "(b, e, 2, 3)")
    check_positions(batch, length, mask, segment_ids)
    expect_floats({"x": x})


def leaky_sum(x, decay, *, initial_state=None, return_final_state=False, mask=None, segment_ids=None):
    check_sum(x, decay, initial_state, mask, segment_ids)
    y, states, _, _ = _run(x, decay, initial_state, mask, segment_ids)
    return (y, states[-1]) if return_final_state else y


def leaky_sum_vjp(dy, dfinal_state, x, decay, *, initial_state=None, mask=None, segment_ids=None):
    _, states, valid, restart = _run(x, decay, initial_state, mask, segment_ids)
    a = sigmoid(float64(decay))
    keep = a[:, None] ** POWERS
    g = np.zeros_like(states[0]) if dfinal_state is None else float64(dfinal_state).copy()
    dx, dkeep = np.zeros(np.shape(x)), np.zeros_like(keep)
    for t in reversed(range(np.shape(x)[1])):
        counts, begins = (flags[:, t, None, None, None] for flags in (valid, restart))
        with_y = g + float64(dy)[:, t, :, None, None]
        dx[:, t] = np.where(valid[:, t, None], (with_y * FACTORS).sum((2, 3)), 0.0)
        before = np.where(begins, 0.0, states[t])
        dkeep += np.where(counts, with_y * before, 0.0).sum((0, 3))
        g = np.where(counts, np.where(begins, 0.0, keep[:, :, None] * with_y), g)
    da = (dkeep * POWERS * a[:, None] ** (POWERS - 1)).sum(1)
    gradients = {"x": dx, "decay": da * a * (1 - a)}
    return gradients if initial_state is None else gradients | {"initial_state": g}


def leaky_sum_step(x, decay, *, state):
    y, state = leaky_sum(np.asarray(x)[:, None], decay, initial_state=state, return_final_state=True)
    return y[:, 0], state


def _run(x, decay, initial_state, mask, segment_ids):
    x, keep = float64(x), (sigmoid(float64(decay))[:, None] ** POWERS)[..., None]
    valid = counting(x.shape, mask)
    restart = restarts(valid, segment_ids)
    h = np.zeros((len(x), x.shape[2], 2, 3)) if initial_state is None else float64(initial_state)
    states, y = [h], np.zeros_like(x)
    for t in range(x.shape[1]):
        counts = valid[:, t, None, None, None]
        after = keep * np.where(restart[:, t, None, None, None], 0.0, h) + x[:, t, :, None, None] * FACTORS
        h = np.where(counts, after, h)
        states.append(h)
        y[:, t] = np.where(valid[:, t, None], h.sum((2, 3)), 0.0)
    return y, states, valid, restart


def draw(rng, choose, b, l):
    e = choose((1, 5, 8))
    arrays = {"x": rng.normal(size=(b, l, e)), "decay": rng.normal(size=e)}
    if choose((False, True)):
        arrays["initial_state"] = rng.normal(size=(b, e, 2, 3))
    return Drawn(arrays, {})


def _forward(inputs, parameters, settings, carried, positions):
    given = {"initial_state": carried[0], **positions._asdict()}
    y, state = leaky_sum(inputs[0], parameters["decay"], return_final_state=True, **given)
    return y, (state,)


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    given = {"initial_state": carried[0], **positions._asdict()}
    gradients = leaky_sum_vjp(dy, dcarried[0], inputs[0], parameters["decay"], **given)
    return [gradients["x"]], {"decay": gradients["decay"]}, (gradients["initial_state"],)


OP = Op(
    name="leaky_sum",
    forward=leaky_sum,
    vjp=leaky_sum_vjp,
    step=leaky_sum_step,
    per_position=("x",),
    float32=("decay", "initial_state", "final_state"),
    state_shape=lambda arrays: (arrays["x"].shape[0], arrays["x"].shape[2], 2, 3),
    draw=draw,
    magnitude=lambda arrays, positions, options: float(
        np.linalg.norm(leaky_sum(**{k: v if k == "decay" else np.abs(v) for k, v in arrays.items()}, **positions))
    ),
)
NODES = {"leaky_sum": NodeOp(_forward, _vjp)}
