"""The causal convolution before the recurrence: a short filter for each channel (Gu and Dao 2023, figure 3)."""

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
    silu,
    silu_derivative,
)


def causal_conv(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
):
    """y_t = activation(bias + sum_j weight_j x_{t-k+1+j}), a filter of width k for each channel.

    The contract is `mamba_core.causal_conv`; computed and returned in float64.
    """
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    inputs, windows, last = _conv_windows(x, weight, initial_state, mask, segment_ids)
    linear = _conv_linear(inputs, windows, weight, bias)
    y = silu(linear) if activation == "silu" else linear
    y = np.where(counting(np.shape(x), mask)[..., None], y, 0.0)
    rows = np.arange(len(inputs))[:, None]
    return (y, inputs[rows, last]) if return_final_state else y


def causal_conv_vjp(
    dy,
    dfinal_state,
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_state=None,
    mask=None,
    segment_ids=None,
) -> dict[str, np.ndarray]:
    """Gradients of `causal_conv`, as `selective_scan_vjp` gives those of the scan."""
    inputs, windows, last = _conv_windows(x, weight, initial_state, mask, segment_ids)
    dy = np.where(counting(np.shape(x), mask)[..., None], float64(dy), 0.0)
    if activation == "silu":
        dy = dy * silu_derivative(_conv_linear(inputs, windows, weight, bias))
    rows = np.arange(len(inputs))[:, None]
    dinputs = np.zeros_like(inputs)
    dweight = np.zeros(weight.shape)
    for tap in range(weight.shape[1]):
        np.add.at(dinputs, (rows, windows[:, :, tap]), dy * float64(weight)[:, tap])
        dweight[:, tap] = np.einsum("ble,ble->e", dy, inputs[rows, windows[:, :, tap]])
    if dfinal_state is not None:
        np.add.at(dinputs, (rows, last), float64(dfinal_state))
    carried = weight.shape[1] - 1
    grads = {"x": dinputs[:, carried:-1], "weight": dweight}
    if bias is not None:
        grads["bias"] = dy.sum((0, 1))
    if initial_state is not None:
        grads["initial_state"] = dinputs[:, :carried]
    return grads


def causal_conv_step(x, weight, bias=None, *, activation=None, state):
    """One position of `causal_conv`: x (b, e), state (b, k-1, e); returns (y, new state)."""
    check_conv_step(x, weight, bias, activation, state)
    y, state = causal_conv(
        np.asarray(x)[:, None], weight, bias, activation=activation, initial_state=state, return_final_state=True
    )
    return y[:, 0], state


def check_conv(x, weight, bias, activation, initial_state, mask, segment_ids) -> None:
    """Check the arguments of `causal_conv`. Raises as `check_scan`."""
    batch, length, channels = shape_of("x", x, ("b", "l", "e"))
    expect_rows("x", batch)
    _check_filter(channels, weight, bias, activation)
    expect_shape("initial_state", initial_state, (batch, weight.shape[1] - 1, channels), "(b, k-1, e)")
    check_positions(batch, length, mask, segment_ids)
    expect_floats({"x": x, "weight": weight})


def check_conv_step(x, weight, bias, activation, state) -> None:
    """Check the arguments of `causal_conv_step`."""
    batch, channels = shape_of("x", x, ("b", "e"))
    expect_rows("x", batch)
    _check_filter(channels, weight, bias, activation)
    if state is None:
        raise ValueError("causal_conv_step needs state=(b, k-1, e); start from zeros")
    expect_shape("state", state, (batch, weight.shape[1] - 1, channels), "(b, k-1, e)")


def _check_filter(channels, weight, bias, activation) -> None:
    _, width = shape_of("weight", weight, ("e", "k"))
    if width < 1:
        raise ValueError("weight has width 0; expected at least one tap")
    expect_shape("weight", weight, (channels, width), "(e, k)")
    expect_shape("bias", bias, (channels,), "(e,)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; expected None or 'silu'")


def _conv_linear(inputs, windows, weight, bias):
    rows = np.arange(len(inputs))[:, None]
    taps = range(weight.shape[1])
    total = sum(inputs[rows, windows[:, :, tap]] * float64(weight)[:, tap] for tap in taps)
    return total if bias is None else total + float64(bias)


def _conv_windows(x, weight, initial_state, mask, segment_ids):
    """The inputs, state first and a zero last; for every position which of them its window holds; the last window.

    A masked position never enters a window; a new segment starts from a window of zeros.
    """
    x = float64(x)
    batch, length, channels = x.shape
    carried = weight.shape[1] - 1
    state = np.zeros((batch, carried, channels)) if initial_state is None else float64(initial_state)
    inputs = np.concatenate([state, x, np.zeros((batch, 1, channels))], axis=1)
    zero = carried + length
    valid = counting(np.shape(x), mask)
    restart = restarts(valid, segment_ids)
    windows = np.full((batch, length, carried + 1), zero)
    last = np.zeros((batch, carried), dtype=int)
    for row in range(batch):
        window = list(range(carried))
        for t in range(length):
            if not valid[row, t]:
                continue
            if restart[row, t]:
                window = [zero] * carried
            windows[row, t] = [*window, carried + t]
            window = list(windows[row, t, 1:])
        last[row] = window
    return inputs, windows, last


# --- how tests draw arguments ------------------------------------------------------------------------------


OPTIONAL = ("bias", "initial_state")
BOTH = ("mask", "segment_ids")
# A call each: dtype, length, channels, taps, activation, and what is given beside x and weight.
SAMPLES = (
    ("float32", 257, 20, 4, "silu", OPTIONAL, BOTH),
    ("float32", 7, 5, 3, None, (), ()),
    ("float32", 1, 33, 2, "silu", OPTIONAL, ()),
    ("float32", 257, 20, 4, "silu", OPTIONAL, ("segment_ids",)),
    ("bfloat16", 257, 20, 4, "silu", OPTIONAL, ()),
    ("float16", 7, 67, 4, None, OPTIONAL, ("segment_ids",)),
    ("float16", 257, 5, 4, "silu", (), ("mask",)),
)


def draw(rng, choose, b: int, l: int) -> Drawn:
    e, k = choose((1, 5, 8, 67)), choose((1, 2, 3, 4))
    given = [name for name in OPTIONAL if choose((False, True))]
    return _draw(rng, b, l, e, k, choose((None, "silu")), given)


def samples(rng):
    for dtype, l, e, k, activation, given, positions in SAMPLES:
        yield Sample(dtype, _draw(rng, 2, l, e, k, activation, given), draw_positions(rng, 2, l, positions))


def _draw(rng, b, l, e, k, activation, given) -> Drawn:
    arrays = {"x": rng.normal(size=(b, l, e)), "weight": rng.normal(size=(e, k))}
    shapes = {"bias": (e,), "initial_state": (b, k - 1, e)}
    arrays |= {name: rng.normal(size=shapes[name]) for name in given}
    return Drawn(arrays, {"activation": activation})


def _state_shape(arrays) -> tuple[int, ...]:
    batch, _, channels = arrays["x"].shape
    return batch, arrays["weight"].shape[1] - 1, channels


OP = Op(
    name="causal_conv",
    forward=causal_conv,
    vjp=causal_conv_vjp,
    step=causal_conv_step,
    per_position=("x",),
    float32=(),
    state_shape=_state_shape,
    draw=draw,
    samples=samples,
)

# --- in the block graph ------------------------------------------------------------------------------------


def _arguments(inputs, parameters, settings, carried, positions):
    weight = parameters["weight"][:, 0]
    fixed = {"initial_state": carried[0] if carried else None, **settings, **positions._asdict()}
    return (inputs[0], weight, parameters.get("bias")), fixed


def _forward(inputs, parameters, settings, carried, positions):
    given, fixed = _arguments(inputs, parameters, settings, carried, positions)
    y, state = causal_conv(*given, return_final_state=True, **fixed)
    return y, (state,)[: len(carried)]


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    given, fixed = _arguments(inputs, parameters, settings, carried, positions)
    gradients = causal_conv_vjp(dy, dcarried[0] if carried else None, *given, **fixed)
    named = {"weight": gradients["weight"][:, None]} | {key: gradients[key] for key in parameters if key == "bias"}
    return [gradients["x"]], named, (gradients["initial_state"],) if carried else ()


NODES = {"causal_conv": reversible(NodeOp(_forward, _vjp))}
