"""The recurrences of Mamba-1 in NumPy float64, one position at a time, with their gradients by hand.

Gu and Dao 2023 (arXiv:2312.00752), equations 2a, 2b and 4 with the discretisation of the published code:
exp(delta A) for A and delta B for B. Written to be read beside the paper; this is what every backend must equal.
"""

import numpy as np

from mamba_core.spec.checks import check_conv, check_conv_step, check_scan, check_step


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

    The contract is `mamba_core.backend.Backend.selective_scan`; computed and returned in float64.
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
    dy = np.where(run.valid[..., None], _float64(dy), 0.0)
    grads = {}
    if z is not None:
        grads["z"] = dy * run.linear * _silu_derivative(_float64(z))
        dy = dy * silu(_float64(z))
    dx = np.zeros_like(x)
    if D is not None:
        grads["D"] = np.einsum("ble,ble->e", dy, x)
        dx += dy * _float64(D)

    dA, dB, dC, dstep = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C), np.zeros_like(step)
    g = np.zeros_like(run.states[0]) if dfinal_state is None else _float64(dfinal_state).copy()
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

    The contract is `mamba_core.backend.Backend.causal_conv`; computed and returned in float64.
    """
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    inputs, windows, last = _conv_windows(x, weight, initial_state, mask, segment_ids)
    linear = _conv_linear(inputs, windows, weight, bias)
    y = silu(linear) if activation == "silu" else linear
    y = np.where(_valid(x, mask)[..., None], y, 0.0)
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
    dy = np.where(_valid(x, mask)[..., None], _float64(dy), 0.0)
    if activation == "silu":
        dy = dy * _silu_derivative(_conv_linear(inputs, windows, weight, bias))
    rows = np.arange(len(inputs))[:, None]
    dinputs = np.zeros_like(inputs)
    dweight = np.zeros(weight.shape)
    for tap in range(weight.shape[1]):
        np.add.at(dinputs, (rows, windows[:, :, tap]), dy * _float64(weight)[:, tap])
        dweight[:, tap] = np.einsum("ble,ble->e", dy, inputs[rows, windows[:, :, tap]])
    if dfinal_state is not None:
        np.add.at(dinputs, (rows, last), _float64(dfinal_state))
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


def softplus(value):
    """log(1 + exp(value)), exact at both ends."""
    return np.logaddexp(0.0, value)


def sigmoid(value):
    return np.exp(-softplus(-value))


def silu(value):
    return value * sigmoid(value)


def _silu_derivative(value):
    return sigmoid(value) * (1.0 + value * sigmoid(-value))


class _Scan:
    """One forward run with all that the gradient needs: the state before the first and after every position."""

    def __init__(self, x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids):
        x, A, B, C = (_float64(value) for value in (x, A, B, C))
        self.x, self.A, self.B, self.C = x, A, B, C
        batch, length, channels = x.shape
        self.valid = _valid(x, mask)
        self.restart = _restarts(self.valid, segment_ids)
        self.raw_step = _float64(delta) + (0.0 if delta_bias is None else _float64(delta_bias))
        step = softplus(self.raw_step) if delta_softplus else self.raw_step
        # A masked position is a step of size zero: exp(0) keeps the state and nothing is added.
        self.step = step = np.where(self.valid[..., None], step, 0.0)

        h = np.zeros((batch, channels, A.shape[1])) if initial_state is None else _float64(initial_state)
        self.states = [h]
        self.linear = np.zeros_like(x)
        for t in range(length):
            h = np.where(self.restart[:, t, None, None], 0.0, h)
            h = np.exp(step[:, t, :, None] * A) * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None, :]
            self.states.append(h)
            self.linear[:, t] = np.einsum("ben,bn->be", h, C[:, t])
        if D is not None:
            self.linear += _float64(D) * x
        y = self.linear if z is None else self.linear * silu(_float64(z))
        self.y = np.where(self.valid[..., None], y, 0.0)


def _conv_linear(inputs, windows, weight, bias):
    rows = np.arange(len(inputs))[:, None]
    taps = range(weight.shape[1])
    total = sum(inputs[rows, windows[:, :, tap]] * _float64(weight)[:, tap] for tap in taps)
    return total if bias is None else total + _float64(bias)


def _conv_windows(x, weight, initial_state, mask, segment_ids):
    """The inputs, state first and a zero last; for every position which of them its window holds; the last window.

    A masked position never enters a window; a new segment starts from a window of zeros.
    """
    x = _float64(x)
    batch, length, channels = x.shape
    carried = weight.shape[1] - 1
    state = np.zeros((batch, carried, channels)) if initial_state is None else _float64(initial_state)
    inputs = np.concatenate([state, x, np.zeros((batch, 1, channels))], axis=1)
    zero = carried + length
    valid = _valid(x, mask)
    restart = _restarts(valid, segment_ids)
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


def _valid(x, mask) -> np.ndarray:
    return np.ones(x.shape[:2], dtype=bool) if mask is None else np.asarray(mask)


def _restarts(valid, segment_ids) -> np.ndarray:
    """(b, l) bool: this position counts and its segment is not that of the last position that counted."""
    restart = np.zeros(valid.shape, dtype=bool)
    if segment_ids is None:
        return restart
    for row, segments in enumerate(np.asarray(segment_ids)):
        current = None
        for t, segment in enumerate(segments):
            if valid[row, t]:
                restart[row, t] = current is not None and segment != current
                current = segment
    return restart


def _float64(value) -> np.ndarray:
    return np.asarray(value).astype(np.float64)
