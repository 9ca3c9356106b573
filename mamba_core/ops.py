"""The ops as functions of any framework's arrays: the arrays choose the backend, NumPy's the float64 reference.

Letters are those of `mamba_core.spec.dims`.
"""

import functools
import math
from typing import Any

import numpy as np

from mamba_core import discovery, registry
from mamba_core.spec.ops.attention import KeyValueCache, Rotary

Array = Any


def selective_scan(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    kernel: str = "auto",
) -> Any:
    """The S6 recurrence over a sequence (Gu and Dao 2023, equations 2 and 4).

        step_t = softplus(delta_t + delta_bias)                      softplus only if delta_softplus
        h_t    = exp(step_t * A) * h_{t-1} + step_t * B_t * x_t
        y_t    = (sum_n C_t h_t + D * x_t) * silu(z_t)               D and z only if given

    x, delta, z, B and C have the compute dtype (float32, bfloat16, float16); A, D, delta_bias and the state float32.
    All arithmetic is float32, or float64 for a float64 x where the framework has it.

    Args:
        x, delta, z: (b, l, e).
        A: (e, n), negative.
        B, C: (b, l, n).
        D, delta_bias: (e,).
        initial_state: (b, e, n), h before the first position; zeros if None.
        return_final_state: return h after the last position too.
        mask: (b, l) bool. A False position leaves h as it was and yields zero, wherever it stands.
        segment_ids: (b, l) int. h restarts from zero at a position that counts whose id differs from that of the last
            position that counted. The first position goes on from initial_state.
        kernel: a kernel's name, see `available_backends`; "auto" for the fastest that runs on x's device; "plain"
            for the framework's own operations.

    Returns:
        y (b, l, e) in x's dtype, and if return_final_state also h (b, e, n) float32 after the last position (the
        initial state where l is 0). Differentiable in every real argument, through y and the final state.

    Raises:
        TypeError: an argument is not an array, or not of real floating-point numbers, or `mask` is not boolean.
        ValueError: a shape does not fit, the batch is empty, or the kernel cannot run here.
    """
    options = {"z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, "initial_state": initial_state}
    positions = {"return_final_state": return_final_state, "mask": mask, "segment_ids": segment_ids}
    return _function("selective_scan", x, kernel)(x, delta, A, B, C, D, **options, **positions)


def selective_step(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    state: Array,
) -> tuple[Array, Array]:
    """One position of `selective_scan`.

    Args:
        x, delta, z: (b, e). B, C: (b, n). state: (b, e, n). The others are as in `selective_scan`.

    Returns:
        y (b, e) in x's dtype, and the new state.

    Raises:
        TypeError, ValueError: as `selective_scan`.
    """
    options = {"z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, "state": state}
    return _module("selective_scan", x).selective_step(x, delta, A, B, C, D, **options)


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Array | None = None,
    return_final_state: bool = False,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    kernel: str = "auto",
) -> Any:
    """The recurrence of Mamba-2, state-space duality (Dao and Gu 2024, arXiv:2405.21060, equations 1 and 2).

        step_t = limit(softplus(dt_t + dt_bias))                     softplus only if dt_softplus
        h_t    = exp(step_t * A) * h_{t-1} + step_t * x_t B_t^T      of each head, (p, n)
        y_t    = (h_t C_t + D * x_t) * silu(z_t)                     D and z only if given

    x, dt, z, B and C have the compute dtype (float32, bfloat16, float16); A, D, dt_bias and the state float32. All
    arithmetic is float32, or float64 for a float64 x where the framework has it.

    Args:
        x, z: (b, l, h, p). dt: (b, l, h).
        A: (h,), negative.
        B, C: (b, l, g, n); head j reads group j // (h / g).
        D: (h,), or (h, p) for a value a channel. dt_bias: (h,).
        dt_limit: the least and the most that a step may be. Beyond them it has no gradient.
        initial_state: (b, h, p, n), h before the first position; zeros if None.
        return_final_state, mask, segment_ids, kernel: as in `selective_scan`.

    Returns:
        y (b, l, h, p) in x's dtype, and if return_final_state also h (b, h, p, n) float32 after the last position (the
        initial state where l is 0). Differentiable in every real argument, through y and the final state. All kernels
        but "plain" compute chunks of positions as matrix products, in which Inf and NaN reach the whole chunk, other
        segments' positions too.

    Raises:
        TypeError, ValueError: as `selective_scan`; also for groups that do not divide the heads, and for a `dt_limit`
            that is no pair of bounds.
    """
    options = {"z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    options |= {"initial_state": initial_state, "return_final_state": return_final_state}
    return _function("ssd", x, kernel)(x, dt, A, B, C, D, **options, mask=mask, segment_ids=segment_ids)


def ssd_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Array,
) -> tuple[Array, Array]:
    """One position of `ssd`.

    Args:
        x, z: (b, h, p). dt: (b, h). B, C: (b, g, n). state: (b, h, p, n). The others are as in `ssd`.

    Returns:
        y (b, h, p) in x's dtype, and the new state.

    Raises:
        TypeError, ValueError: as `ssd`.
    """
    options = {"z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "state": state}
    return _module("ssd", x).ssd_step(x, dt, A, B, C, D, **options)


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    kernel: str = "auto",
) -> Any:
    """A causal filter of width k for each channel: y_t = activation(bias + sum_j weight[:, j] * x_{t-k+1+j}).

    Args:
        x: (b, l, e). weight: (e, k), the newest input's tap last. bias: (e,).
        activation: None or "silu".
        initial_state: (b, k-1, e), the inputs before the first position, oldest first; zeros if None.
        return_final_state: return the last k-1 inputs that counted too.
        mask, segment_ids: as in `selective_scan`. A position that does not count is absent from every window and yields
            zero; a restart begins from a window of zeros.
        kernel: as in `selective_scan`.

    Returns:
        y (b, l, e) in x's dtype, and if return_final_state also the last k-1 inputs that counted (b, k-1, e) in x's
        dtype. Differentiable in x, weight, bias and initial_state, through both results.

    Raises:
        TypeError, ValueError: as `selective_scan`.
    """
    options = {"activation": activation, "initial_state": initial_state, "return_final_state": return_final_state}
    positions = {"mask": mask, "segment_ids": segment_ids}
    return _function("causal_conv", x, kernel)(x, weight, bias, **options, **positions)


def causal_conv_step(
    x: Array, weight: Array, bias: Array | None = None, *, activation: str | None = None, state: Array
) -> tuple[Array, Array]:
    """One position of `causal_conv`.

    Args:
        x: (b, e). state: (b, k-1, e), the inputs before it, oldest first. The others are as in `causal_conv`.

    Returns:
        y (b, e) in x's dtype, and the new state.

    Raises:
        TypeError, ValueError: as `selective_scan`.
    """
    return _module("causal_conv", x).causal_conv_step(x, weight, bias, activation=activation, state=state)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    rotary: Rotary = Rotary(),  # noqa: B008 (a tuple)
    cache: KeyValueCache | None = None,
    return_cache: bool = False,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    kernel: str = "auto",
) -> Any:
    """Causal attention: y_t = sum_s softmax_s(scale * q_t k_s) v_s (Vaswani et al. 2017, equation 1).

    The sum is over the positions s <= t that count and are of the same sequence. Scores and softmax are float32, or
    float64 for a float64 q where the framework has it.

    Args:
        q: (b, l, h, p). k, v: (b, l, g, p), g a divisor of h; head j reads keys and values j // (h / g).
        scale: None for 1 / sqrt(p).
        rotary: how q and k turn with their place in the sequence; not at all by default. Keys are cached turned.
        cache: keys and values from before the first position, which goes on from them; None for none. Its capacity must
            hold the new positions too: NumPy arrays raise where it does not, and those of a framework, which may be
            compiled, give NaN at the positions that find no room.
        return_cache: return the cache with the new positions as well. Without one given, it has a capacity of l.
        mask: (b, l) bool. A False position is seen by no other, enters no cache and yields zero, wherever it stands.
        segment_ids: (b, l) int. A sequence begins anew at a position that counts whose id differs from that of the last
            position that counted. The first position goes on from the cache; the last sequence alone is cached.
        kernel: as in `selective_scan`.

    Returns:
        y (b, l, h, p) in q's dtype, and if return_cache also a `KeyValueCache`. Differentiable in q, k, v and the
        cache's keys and values, through y and the final cache.

    Raises:
        TypeError, ValueError: as `selective_scan`; also for groups that do not divide the heads.
    """
    options = {"scale": scale, "rotary": rotary, "cache": cache, "return_cache": return_cache}
    return _function("attention", q, kernel)(q, k, v, **options, mask=mask, segment_ids=segment_ids)


def mixture_of_experts(
    x: Array,
    logits: Array,
    gate_up: Array,
    down: Array,
    *,
    top_k: int,
    mask: Array | None = None,
    kernel: str = "auto",
) -> Array:
    """Each position by its top_k likeliest experts, SwiGLUs, weighted by their probabilities among all experts.

        y = sum over them of p_e * down_e (silu(gate_e x) * up_e x),     p = softmax(logits) in float32

    No position is dropped, and the result of a position does not depend on others.

    Args:
        x: (b, l, d).
        logits: (b, l, experts), of a router. Of equal ones the expert with the lower number is chosen first.
        gate_up: (experts, 2 i, d), the gate's rows before the others. down: (experts, d, i).
        top_k: how many experts compute a position.
        mask: (b, l) bool. A False position is computed by none and yields zero.
        kernel: as in `selective_scan`.

    Returns:
        y (b, l, d) in x's dtype. Differentiable in every array but the mask; the choice itself has no gradient.

    Raises:
        TypeError, ValueError: as `selective_scan`; also for a top_k that is not from 1 to the number of experts.
    """
    return _function("mixture_of_experts", x, kernel)(x, logits, gate_up, down, top_k=top_k, mask=mask)


def _function(op: str, x: Array, kernel: str):
    """The op for arrays such as x, by that kernel."""
    module = _module(op, x)
    if not isinstance(x, np.ndarray):
        return functools.partial(getattr(module, op), kernel=kernel)
    if kernel not in ("auto", "plain", "sequential"):
        raise ValueError(f"no kernel {kernel!r} for NumPy arrays; expected 'auto', 'plain' or 'sequential'")
    return getattr(module, op)


def _module(op: str, x: Array) -> Any:
    """The file of the op for arrays such as x."""
    return discovery.find("spec.ops", op) if isinstance(x, np.ndarray) else _backend_of(type(x)).op(op)  # type: ignore[arg-type]


@functools.cache  # to look for what is installed takes longer than a small scan
def _backend_of(kind: type) -> Any:
    package = kind.__module__.partition(".")[0]
    name = {"jaxlib": "jax"}.get(package, package)
    if name not in registry.names():
        expected = ", ".join(["numpy", *registry.names()])
        raise TypeError(f"x is {kind.__module__}.{kind.__qualname__}; expected an array of {expected}")
    return registry.get(name)
