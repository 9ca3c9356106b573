"""Mixtures of experts in JAX: positions sorted by expert, and products of ragged groups.

XLA has no product of ragged groups on a CPU, where the plain form computes each row by every expert. The forms for CPUs
are in `kernels/expert_blocks.py` and, for a few positions, `kernels/native_experts.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.backends.jax.kernels import expert_blocks, native_experts
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.positions import call_of, where_counting
from mamba_core.kernels import choose
from mamba_core.spec.ops.mixture_of_experts import check_experts


def mixture_of_experts(x, logits, gate_up, down, *, top_k, mask=None, kernel="auto"):
    check_experts(x, logits, gate_up, down, top_k, mask)
    call = call_of(mask, None, length=x.shape[1])
    return mix(call, x, logits, gate_up, down, top_k=top_k, kernel=kernel)


def mix(call, x, logits, gate_up, down, *, top_k, kernel="auto"):
    """`mixture_of_experts` in a call whose positions are known."""
    if kernel != "auto":
        kernel = choose(kernel, kernels("cpu"), "mixture_of_experts")  # where it runs is not known yet
    if isinstance(x.shape[1], int) and x.shape[1] == 0:
        return x
    return _mix(x, logits, gate_up, down, call.mask, top_k=top_k, kernel=kernel)


def kernels(device: str, dtype=None) -> dict[str, str | None]:
    """Fastest first. The two last are JAX's own operations, which run on every device."""
    on_cpu = None if device == "cpu" else "it was made for a CPU"
    return {"native": native_experts.reason(device, dtype), "blocks": on_cpu, "ragged": None}


def swiglu(x: jax.Array) -> jax.Array:
    """silu(gate) * up of gate | up (..., 2 i), computed at least in float32."""
    return expert_blocks.gated(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("top_k", "kernel"))
def _mix(x, logits, gate_up, down, mask, *, top_k, kernel):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, logits = where_counting(mask, x), where_counting(mask, logits)
    # Of equals lax.top_k takes the lower number.
    _, chosen = lax.top_k(logits, top_k)
    probability = jnp.take_along_axis(jax.nn.softmax(logits.astype(wide)), chosen, axis=-1)
    rows = x.shape[0] * x.shape[1]
    arguments = (x.reshape(rows, -1), chosen.reshape(rows, -1), probability.reshape(rows, -1), gate_up, down)
    if kernel == "auto":
        name = choose("auto", kernels("cpu", x.dtype), "mixture_of_experts")
        on_cpu = functools.partial(native, portable=True) if name == "native" else KERNELS[name]
        y = lax.platform_dependent(*arguments, cpu=on_cpu, default=ragged)
    else:
        y = KERNELS[kernel](*arguments)
    return where_counting(mask, y.astype(x.dtype).reshape(x.shape))


def _are_few(chosen, gate_up) -> bool:
    """Whether the chosen experts are at most as many as there are, each counted for every position."""
    return isinstance(chosen.size, int) and chosen.size <= gate_up.shape[0]


def ragged(x, chosen, probability, gate_up, down):
    """x (m, d), chosen and probability (m, k) -> (m, d), at least in float32."""
    if _are_few(chosen, gate_up):
        return _gathered(x, chosen, probability, gate_up, down)
    order, sizes = _sorted(chosen, gate_up.shape[0])
    given = x[order // chosen.shape[1]]
    # XLA may multiply the weights of an expert that nobody chose by zeros, and 0 * NaN is not 0.
    gate_up, down = (jnp.where((sizes > 0)[:, None, None], weight, 0) for weight in (gate_up, down))
    active = expert_blocks.gated(_product(given, gate_up, sizes)).astype(x.dtype)
    return _together(_product(active, down, sizes), order, probability)


def _gathered(x, chosen, probability, gate_up, down):
    """A few positions: the weights of the experts that they have chosen, side by side."""
    how = {"precision": precision(str(x.dtype)), "preferred_element_type": probability.dtype}
    active = expert_blocks.gated(jnp.einsum("md,mkid->mki", x, gate_up[chosen], **how)).astype(x.dtype)
    return jnp.einsum("mki,mkdi,mk->md", active, down[chosen], probability, **how)


def _sorted(chosen, experts):
    """(order, sizes): of the choices, read row by row, such that those of an expert follow each other; how many each
    has."""
    flat = chosen.reshape(-1)
    return jnp.argsort(flat, stable=True), (flat[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)


def _together(out, order, probability):
    """(m, d): the sum over each position's choices, of which `out` has one a row in that order."""
    back = out[jnp.argsort(order)].reshape(*probability.shape, out.shape[-1])
    return (back * probability[..., None]).sum(1)


def _product(x, weight, sizes):
    """(n, o) at least in float32: so many rows of x (n, i) after the other by each weight of (experts, o, i)."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    how = {"precision": precision(str(x.dtype)), "preferred_element_type": jnp.promote_types(x.dtype, jnp.float32)}
    return lax.ragged_dot_general(x, weight, sizes, numbers, **how)


def native(x, chosen, probability, gate_up, down, *, portable=False):
    """As `ragged`: a few positions in a dtype that the library has by that, and others as `blocks` has them."""
    if native_experts.why_not(x, gate_up, down) is not None:
        return blocks(x, chosen, probability, gate_up, down)
    return _native(x, chosen, probability, gate_up, down, portable=portable)


def blocks(x, chosen, probability, gate_up, down):
    """As `ragged`, by the products that XLA has on a CPU."""
    if not isinstance(chosen.size, int):  # an exported program may be for any length
        return ragged(x, chosen, probability, gate_up, down)
    if _are_few(chosen, gate_up):
        return _one_by_one(x, chosen, probability, gate_up, down)
    order, sizes = _sorted(chosen, gate_up.shape[0])
    out = expert_blocks.products(x[order // chosen.shape[1]], sizes, gate_up, down)
    return _together(out, order, probability)


def _one_by_one(x, chosen, probability, gate_up, down):
    """As `_gathered`, each choice of each row by itself: XLA gathers weights slowly on a CPU."""

    def choice(inputs):
        return _gathered(*inputs, gate_up, down)[0]

    top_k = chosen.shape[1]
    each = (jnp.repeat(x, top_k, axis=0)[:, None], chosen.reshape(-1, 1, 1), probability.reshape(-1, 1, 1))
    return lax.map(choice, each).reshape(-1, top_k, x.shape[1]).sum(1)


_native = native_experts.beside(_one_by_one)
KERNELS = {"native": native, "blocks": blocks, "ragged": ragged}
