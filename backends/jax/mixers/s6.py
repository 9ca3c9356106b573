"""The parts of mixers like Mamba-1's, as functions of the mixer that has the parameters."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax import layers
from mamba_core.backends.jax.kernels import native_mamba_step
from mamba_core.backends.jax.kernels.native_step import MixerStep
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.ops.rms_norm import rms_norm
from mamba_core.backends.jax.ops.selective_scan import scan, selective_step
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call

# Names of the native library's block step -> paths in the mixer.
NATIVE_STEP = {
    "in_proj.weight": ("in_proj", "kernel"),
    "in_proj.bias": ("in_proj", "bias"),
    "conv.weight": ("conv1d", "kernel"),
    "conv.bias": ("conv1d", "bias"),
    "x_proj.weight": ("x_proj", "kernel"),
    "dt_proj": ("dt_proj", "kernel"),
    "delta_bias": ("dt_proj", "bias"),
    "A_log": ("A_log",),
    "D": ("D",),
    "out_proj.weight": ("out_proj", "kernel"),
    "out_proj.bias": ("out_proj", "bias"),
}


def add_parameters(mixer: nnx.Module, config, options) -> None:
    """Gives the mixer the layers and parameters of Mamba-1, and the policy of kernels."""
    d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer.kernels = options.kernels
    of_layers = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
    of_layers |= {"rngs": options.rngs}
    mixer.in_proj = nnx.Linear(d, 2 * e, use_bias=config.bias, **of_layers)
    filters = {"padding": "CAUSAL", "feature_group_count": e, "use_bias": config.conv_bias}
    mixer.conv1d = nnx.Conv(e, e, k, **filters, **of_layers)
    mixer.x_proj = nnx.Linear(e, r + 2 * n, use_bias=False, **of_layers)
    mixer.dt_proj = nnx.Linear(r, e, **of_layers)
    mixer.A_log = nnx.Param(jnp.zeros((e, n)))
    mixer.D = nnx.Param(jnp.ones(e))
    mixer.out_proj = nnx.Linear(e, d, use_bias=config.bias, **of_layers)


# --- the parts of a call, in their order -----------------------------------------------------------


def project_in(mixer, hidden: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
    """hidden (b, l, d) -> x, z (b, l, e)."""
    x, z = jnp.split(call.observe("in_proj", layers.linear(mixer.in_proj, hidden, mixer.kernels)), 2, axis=-1)
    return call.observe("x", x), call.observe("z", z)


def convolve(mixer, x: jax.Array, state, call: Call) -> tuple[jax.Array, jax.Array]:
    """(x (b, l, e) after the convolution and its SiLU, its state)."""
    kernel = mixer.kernels.of("causal_conv")
    y, after = layers.convolution(mixer.conv1d, x, state.conv, call, kernel, "mixer.conv1d")
    return call.observe("conv", y), after


def select(mixer, x: jax.Array, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (b, l, e) -> dt (b, l, r), B and C (b, l, n)."""
    dtbc, n = call.observe("x_proj", layers.linear(mixer.x_proj, x, mixer.kernels)), mixer.A_log.shape[1]
    r = dtbc.shape[-1] - 2 * n
    dt, B, C = jnp.split(dtbc, (r, r + n), axis=-1)
    return call.observe("dt", dt), call.observe("B", B), call.observe("C", C)


def norm_selection(dt, B, C, eps: float, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dt, B and C after an RMS norm without weight of each."""
    named = {"dt_norm": dt, "B_norm": B, "C_norm": C}
    dt, B, C = (call.observe(name, rms_norm(value, None, eps, value.dtype)) for name, value in named.items())
    return dt, B, C


def step_sizes(mixer, dt: jax.Array, call: Call) -> tuple[jax.Array, jax.Array | None]:
    """(b, l, e) without the bias of dt_proj, which enters inside the scan, before the softplus; and the bias.

    None for it where dt_proj is called, which adds its own.
    """
    delta, bias = layers.step_projection(mixer.dt_proj, dt)
    return call.observe("dt_proj", delta), bias


def recur(mixer, x, delta, B, C, z, bias, state, call: Call) -> tuple[jax.Array, jax.Array]:
    """(y (b, l, e) of the recurrence, gated where there is a z; its state). bias: what enters as delta_bias."""
    A, D = -jnp.exp(mixer.A_log[...]), None if mixer.D is None else mixer.D[...]
    options = {"delta_bias": bias, "delta_softplus": True}
    if call.one:
        x, delta, B, C, z = (None if value is None else value[:, 0] for value in (x, delta, B, C, z))
        y, after = selective_step(x, delta, A, B, C, D, z=z, **options, state=state.ssm)
        y = y[:, None]
    else:
        options |= {"initial_state": state.ssm, "kernel": mixer.kernels.of("selective_scan")}
        y, after = scan(call, x, delta, A, B, C, D, z=z, **options)
    return call.observe("scan", y), after


def project_out(mixer, y: jax.Array, call: Call) -> jax.Array:
    """y (b, l, e) -> (b, l, d)."""
    return call.observe("out_proj", layers.linear(mixer.out_proj, y, mixer.kernels))


# --- what a mixer made of them may have in its own class -------------------------------------------


def native_operands(mixer, selection_eps: float | None = None) -> MixerStep | str:
    """For the way of that name, where all layers are those that `add_parameters` made.

    selection_eps: the eps of `norm_selection`; None for a mixer that does not call it.
    """
    linears = {name: getattr(mixer, name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    replaced = [name for name, layer in linears.items() if not untouched(nnx.Linear, layer)]
    if replaced or not layers.is_convolution(mixer.conv1d) or not untouched(type(mixer), mixer):
        return f"{', '.join(replaced) or 'the mixer or its convolution'} was replaced or changed"
    if mixer.x_proj.bias is not None or mixer.dt_proj.bias is None or mixer.D is None:
        return "a bias of x_proj was added, or that of dt_proj or D was removed"
    if selection_eps is None:
        return MixerStep(native_mamba_step.KIND, NATIVE_STEP)
    if not selection_eps >= jnp.finfo("float32").tiny:
        return f"the eps of its norms, {selection_eps}, is too small for float32"
    return MixerStep(native_mamba_step.KIND, NATIVE_STEP, (("selection_eps", selection_eps),))


def width(mixer) -> int | None:
    """Elements of its widest array, in_proj's output, for each position; None if a layer was replaced or changed.

    Another layer may look along the sequence.
    """
    linears = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    is_built = untouched(nnx.Linear, *linears) and layers.is_convolution(mixer.conv1d)
    return 2 * mixer.A_log.shape[0] if is_built else None


def project_for_last(mixer, hidden: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """x (b, l, e), and z (b, 1, e) of the last position only; None where a call would compute other values."""
    if not can_compute_last_only(mixer, hidden):
        return None
    e = mixer.in_proj.kernel.shape[1] // 2
    return project_columns(mixer, hidden, slice(e)), project_columns(mixer, hidden[:, -1:], slice(e, None))


def can_compute_last_only(mixer, hidden: jax.Array) -> bool:
    """Whether the gates of all positions but the last may be skipped. In a half precision a call rounds before them."""
    length = hidden.shape[1]
    # An exported program may be for any length.
    several = isinstance(length, int) and length > 1 and hidden.dtype == jnp.float32
    return several and untouched(nnx.Linear, mixer.in_proj, mixer.out_proj)


def project_columns(mixer, hidden: jax.Array, columns: slice) -> jax.Array:
    """These outputs of in_proj alone."""
    layer = mixer.in_proj
    y = jnp.matmul(hidden, layer.kernel[...][:, columns], precision=layer.precision)
    return y if layer.bias is None else y + layer.bias[...][columns]
