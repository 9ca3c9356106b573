"""SwiGLU, and mixtures of such experts (Shazeer 2020, arXiv:2002.05202; Fedus et al. 2021, arXiv:2101.03961)."""

import numpy as np

from mamba_core.spec.ops.base import (
    NodeOp,
    check_positions,
    expect_floats,
    expect_rows,
    expect_shape,
    float64,
    shape_of,
    silu,
    silu_derivative,
    stateless,
)
from mamba_core.spec.ops.elementwise import where_counting


def swiglu(x: np.ndarray) -> np.ndarray:
    """silu(gate) * up, of gate | up (..., 2 i)."""
    gate, up = np.split(x, 2, axis=-1)
    return silu(gate) * up


def swiglu_vjp(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x, 2, axis=-1)
    return np.concatenate([dy * up * silu_derivative(gate), dy * silu(gate)], axis=-1)


def mixture_of_experts(x, logits, gate_up, down, *, top_k: int, mask=None):
    """y = sum over the top_k likeliest experts e of p_e * down_e(silu(gate_e x) * up_e x), p = softmax(logits).

    The contract is `mamba_core.mixture_of_experts`; computed and returned in float64.
    """
    check_experts(x, logits, gate_up, down, top_k, mask)
    x, logits, gate_up, down = map(float64, (x, logits, gate_up, down))
    y, probability, chosen = np.zeros_like(x), softmax(logits), choice(logits, top_k)
    for expert in range(len(gate_up)):
        at = _counting(chosen == expert, mask)
        y[at] += probability[at][:, expert, None] * (swiglu(x[at] @ gate_up[expert].T) @ down[expert].T)
    return y


def mixture_of_experts_vjp(dy, x, logits, gate_up, down, *, top_k: int, mask=None) -> dict[str, np.ndarray]:
    """Gradients of x, logits, gate_up and down. Which experts are chosen has none."""
    dy, x, logits, gate_up, down = map(float64, (dy, x, logits, gate_up, down))
    probability, chosen = softmax(logits), choice(logits, top_k)
    found = {"x": x, "logits": logits, "gate_up": gate_up, "down": down}
    found = {name: np.zeros_like(value) for name, value in found.items()}
    dprobability = np.zeros_like(probability)
    for expert in range(len(gate_up)):
        at = _counting(chosen == expert, mask)
        projected = x[at] @ gate_up[expert].T
        active = swiglu(projected)
        weighted = dy[at] * probability[at][:, expert, None]
        dprobability[..., expert][at] = (dy[at] * (active @ down[expert].T)).sum(-1)
        dprojected = swiglu_vjp(weighted @ down[expert], projected)
        found["x"][at] += dprojected @ gate_up[expert]
        found["gate_up"][expert] = dprojected.T @ x[at]
        found["down"][expert] = weighted.T @ active
    dlogits = probability * (dprobability - (probability * dprobability).sum(-1, keepdims=True))
    # A position that does not count may hold NaN, and 0 * NaN is not 0.
    found["logits"] = where_counting(dlogits, None if mask is None else np.asarray(mask))
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def choice(logits: np.ndarray, top_k: int) -> np.ndarray:
    """(..., top_k) int, the experts with the largest logits; of equal ones that with the lower number comes first."""
    return np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]


def balance_loss(logits, top_k: int, mask=None) -> tuple[float, np.ndarray]:
    """The auxiliary loss that draws a router towards equal use of its experts, and its gradient in the logits.

        E * sum_e f_e P_e, f_e the mean number of times that a position chose e, P_e the mean of its probability

    logits: (layers, b, l, E); the means are over all layers and all positions that count, as in transformers'
    `load_balancing_loss_func`. 0 where no position counts.
    """
    logits = float64(logits)
    experts = logits.shape[-1]
    counts = np.ones(logits.shape[:-1], bool) if mask is None else np.broadcast_to(mask, logits.shape[:-1])
    total = counts.sum()
    if total == 0:
        return 0.0, np.zeros_like(logits)
    probability = softmax(logits)
    chosen = (choice(logits, top_k)[..., None] == np.arange(experts)).sum(-2)
    counted = (np.where(counts[..., None], value, 0.0) for value in (chosen, probability))
    used, mean = (value.reshape(-1, experts).sum(0) / total for value in counted)
    dprobability = np.where(counts[..., None], experts * used / total, 0.0)
    gradient = probability * (dprobability - (probability * dprobability).sum(-1, keepdims=True))
    return float(experts * (used * mean).sum()), gradient


def check_experts(x, logits, gate_up, down, top_k, mask=None) -> None:
    """Check the arguments of `mixture_of_experts`.

    Raises:
        TypeError: an argument is not an array, or of another kind of dtype.
        ValueError: a shape does not fit, the batch is empty, or there are fewer experts than are to be chosen.
    """
    batch, length, width = shape_of("x", x, ("b", "l", "d"))
    expect_rows("x", batch)
    experts, rows, _ = shape_of("gate_up", gate_up, ("experts", "2 i", "d"))
    if rows % 2:
        raise ValueError(f"gate_up has {rows} rows; expected an even number, the gate's before the others'")
    expect_shape("gate_up", gate_up, (experts, rows, width), "(experts, 2 i, d)")
    expect_shape("down", down, (experts, width, rows // 2), "(experts, d, i)")
    expect_shape("logits", logits, (batch, length, experts), "(b, l, experts)")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k!r}; expected an integer from 1 to {experts}, the number of experts")
    expect_floats({"x": x, "logits": logits, "gate_up": gate_up, "down": down})
    check_positions(batch, length, mask, None)


def _counting(takes: np.ndarray, mask) -> np.ndarray:
    """(b, l): the positions that count and have chosen an expert, of (b, l, top_k)."""
    at = np.asarray(takes.any(-1))
    return at if mask is None else at & np.asarray(mask)


# --- in the block graph ------------------------------------------------------------------------------------


def _forward(inputs, parameters, settings, carried, positions):
    return mixture_of_experts(*inputs, **parameters, **settings, mask=positions.mask), ()


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    found = mixture_of_experts_vjp(dy, *inputs, **parameters, **settings, mask=positions.mask)
    return [found["x"], found["logits"]], {name: found[name] for name in parameters}, ()


NODES = {
    "swiglu": stateless(lambda inputs, *_: swiglu(inputs[0]), lambda dy, inputs, *_: ([swiglu_vjp(dy, inputs[0])], {})),
    "mixture_of_experts": NodeOp(_forward, _vjp),
}
