"""The norm, the Mamba-1 mixer and the residual block, as `flax.nnx` modules with flax's own parameter names."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mamba_core.backend import LayerState
from mamba_core.backends.jax.conv import causal_conv, causal_conv_step
from mamba_core.backends.jax.scan import selective_scan, selective_step
from mamba_core.observe import unobserved, within

# Bytes of a mixer's widest array, the product with in_proj, that are computed at once on a CPU: much more leaves the
# cache, and is taken from the system anew each time. And the fewest positions of a row.
PIECE_BYTES, FEWEST = 2**23, 256


def precision(dtype: str) -> lax.Precision | None:
    """Of products of that dtype: by default GPU and TPU would round float32 to TF32 or bfloat16."""
    return lax.Precision.HIGHEST if dtype == "float32" else None


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale in float32, returned in `dtype`; `nnx.RMSNorm` would first round x to it."""

    def __init__(self, size: int, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return (x * scale * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class MambaMixer(nnx.Module):
    """The mixer of Mamba-1 (Gu and Dao 2023, figure 3)."""

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
        self.splits = (r, r + n)
        self.kernels = kernels
        self.minimamba = config.compat == "minimamba"
        options = {"dtype": dtype, "param_dtype": dtype, "precision": precision(dtype), "rngs": rngs}
        self.in_proj = nnx.Linear(d, 2 * e, use_bias=config.bias, **options)
        self.conv1d = nnx.Conv(e, e, k, padding="CAUSAL", feature_group_count=e, use_bias=config.conv_bias, **options)
        self.x_proj = nnx.Linear(e, r + 2 * n, use_bias=False, **options)
        self.dt_proj = nnx.Linear(r, e, **options)
        self.A_log = nnx.Param(jnp.zeros((e, n)))
        self.D = nnx.Param(jnp.ones(e))
        self.out_proj = nnx.Linear(e, d, use_bias=config.bias, **options)

    def __call__(self, hidden: jax.Array, state: LayerState, mask, segment_ids, observe):
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        xz = observe("in_proj", self.in_proj(hidden))
        x, z = jnp.split(xz, 2, axis=-1)
        x, z = observe("x", x), observe("z", z)
        y, state = self._mix(x, None if self.minimamba else z, state, mask, segment_ids, observe)
        if self.minimamba:
            y = observe("gate", y * z)
        return observe("out_proj", self.out_proj(y)), state

    def last(self, hidden: jax.Array, state: LayerState, mask, segment_ids):
        """What a call gives at the last position, (b, 1, d), and the state: of the gates no others are computed."""
        x, z = map(self._project_in, (hidden, hidden[:, -1:]), range(2))
        y, state = self._mix(x, None, state, mask, segment_ids, unobserved)
        return self.out_proj(y[:, -1:] * (z if self.minimamba else jax.nn.silu(z))), state

    def gives_last(self, hidden: jax.Array) -> bool:
        """Whether `last` computes what a call would; in bfloat16 it would round before the gate."""
        layer = self.in_proj
        ours = type(self) is MambaMixer and type(layer) is nnx.Linear and layer.dot_general is lax.dot_general
        # An exported program may be for any length.
        return ours and isinstance(hidden.shape[1], int) and hidden.shape[1] > 1 and hidden.dtype == jnp.float32

    def _project_in(self, hidden, half):
        """x or z, the first or the second half of in_proj's outputs."""
        layer, e = self.in_proj, self.in_proj.out_features // 2
        y = jnp.matmul(hidden, layer.kernel[...][:, half * e : (half + 1) * e], precision=layer.precision)
        return y if layer.bias is None else y + layer.bias[...][half * e : (half + 1) * e]

    def _mix(self, x, z, state, mask, segment_ids, observe):
        """What is between in_proj and out_proj, but the gate where z is None; (b, l, e) and the state."""
        one = x.shape[1] == 1 and mask is None
        x, conv = self._conv_one(x, state) if one else self._conv(x, state, mask, segment_ids)
        dtbc = observe("x_proj", self.x_proj(observe("conv", x)))
        dt, B, C = jnp.split(dtbc, self.splits, axis=-1)
        dt, B, C = observe("dt", dt), observe("B", B), observe("C", C)
        # The bias of dt_proj enters in float32 inside the scan, before the softplus.
        delta = observe("dt_proj", jnp.matmul(dt, self.dt_proj.kernel[...], precision=self.dt_proj.precision))
        scan = (x, delta, B, C, z)
        y, ssm = self._scan_one(*scan, state) if one else self._scan(*scan, state, mask, segment_ids)
        return observe("scan", y), LayerState(conv, ssm)

    def _conv(self, x, state, mask, segment_ids):
        return causal_conv(
            x,
            *self._filter(),
            activation="silu",
            initial_state=state.conv,
            return_final_state=True,
            mask=mask,
            segment_ids=segment_ids,
            kernel=self.kernels,
        )

    def _conv_one(self, x, state):
        y, conv = causal_conv_step(x[:, 0], *self._filter(), activation="silu", state=state.conv)
        return y[:, None], conv

    def _filter(self):
        bias = self.conv1d.bias
        return self.conv1d.kernel[...][:, 0].T, None if bias is None else bias[...]

    def _scan(self, x, delta, B, C, z, state, mask, segment_ids):
        return selective_scan(
            x,
            delta,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            z=z,
            delta_bias=self._delta_bias(),
            delta_softplus=True,
            initial_state=state.ssm,
            return_final_state=True,
            mask=mask,
            segment_ids=segment_ids,
            kernel=self.kernels,
        )

    def _scan_one(self, x, delta, B, C, z, state):
        y, ssm = selective_step(
            x[:, 0],
            delta[:, 0],
            -jnp.exp(self.A_log[...]),
            B[:, 0],
            C[:, 0],
            self.D[...],
            z=None if z is None else z[:, 0],
            delta_bias=self._delta_bias(),
            delta_softplus=True,
            state=state.ssm,
        )
        return y[:, None], ssm

    def _delta_bias(self):
        """MiniMamba adds it twice."""
        return 2 * self.dt_proj.bias[...] if self.minimamba else self.dt_proj.bias[...]


class Block(nnx.Module):
    """residual + mixer(norm(residual))."""

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mixer = MIXERS[config.architecture](config, dtype, kernels, rngs)

    def __call__(self, residual: jax.Array, state: LayerState, mask, segment_ids, observe):
        hidden, state = self.mixer(observe("norm", self.norm(residual)), state, mask, segment_ids, observe)
        return observe("residual", residual + hidden), state

    def last(self, residual: jax.Array, state: LayerState, mask, segment_ids, observe):
        """As a call, but where that is less to compute the residual stream of the last position only, (b, 1, d)."""
        normed = self.norm(residual)
        if not (observe is unobserved and self.mixer.gives_last(normed)):
            return self(residual, state, mask, segment_ids, observe)
        hidden, state = self.mixer.last(normed, state, mask, segment_ids)
        return residual[:, -1:] + hidden, state


def through(
    blocks, residual: jax.Array, states, mask, segment_ids, observe, remat=False, last=False
) -> tuple[jax.Array, tuple]:
    """The residual stream and the states after all blocks; last: of the stream the last position is enough."""
    run, after = _recomputed if remat and observe is unobserved else _called, []
    if observe is unobserved and mask is None and segment_ids is None and (piece := _piece(blocks, residual)):
        run = functools.partial(_piecewise, run, piece=piece)
    for index, (block, state) in enumerate(zip(blocks, states, strict=True)):
        if last and index + 1 == len(blocks) and run is _called and type(block) is Block:
            run = Block.last
        residual, state = run(block, residual, state, mask, segment_ids, within(f"layers.{index}.", observe))
        after.append(state)
    return residual, tuple(after)


def _called(block, *arguments):
    return block(*arguments)


def _piece(blocks, residual) -> int | None:
    """How many positions a block on a CPU is given at once, one piece after the other; None if all."""
    batch, length, _ = residual.shape
    # An exported program may be for any length.
    if not (isinstance(batch, int) and isinstance(length, int) and all(map(_is_ours, blocks))):
        return None
    width = blocks[0].mixer.in_proj.out_features * residual.dtype.itemsize
    piece = max(FEWEST, PIECE_BYTES // (width * max(1, batch)))
    return piece if length > piece else None


def _is_ours(block: nnx.Module) -> bool:
    """Whether it goes on from a state, and changes nothing of itself, such as a count of draws, when called."""
    ours = type(block) is Block and type(block.mixer) is MambaMixer
    return ours and not jax.tree.leaves(nnx.state(block, nnx.Not(nnx.Param)))


def _piecewise(run, block, residual, state, *positions, piece):
    """On a CPU a block of the pieces of the residual stream, each going on from the state that the last has left."""
    definition, parameters = nnx.split(block)

    def whole(parameters, residual, state):
        return run(nnx.merge(definition, parameters), residual, state, *positions)

    def in_pieces(parameters, residual, state):
        batch, length, width = residual.shape
        count = length // piece
        parts = residual[:, : count * piece].reshape(batch, count, piece, width).swapaxes(0, 1)
        state, parts = lax.scan(lambda state, part: whole(parameters, part, state)[::-1], state, parts)
        done = parts.swapaxes(0, 1).reshape(batch, count * piece, width)
        if count * piece < length:
            rest, state = whole(parameters, residual[:, count * piece :], state)
            done = jnp.concatenate([done, rest], axis=1)
        return done, state

    if run is _called:  # A gradient then keeps much of the block, and more of it in pieces.
        in_pieces = jax.custom_jvp(in_pieces)
        in_pieces.defjvp(functools.partial(jax.jvp, whole))
    return lax.platform_dependent(parameters, residual, state, cpu=in_pieces, default=whole)


def _recomputed(block, residual, state, mask, segment_ids, observe):
    """Called again in the backward pass, from its inputs, which are all that is kept of it."""
    definition, parameters = nnx.split(block)

    def call(parameters, residual, state):
        return nnx.merge(definition, parameters)(residual, state, mask, segment_ids, observe)

    def backward(inputs, cotangents):
        parameters, residual, state = inputs
        # Zero, but XLA cannot know: it would compute all blocks again at once, or share what the forward computed, for
        # on a CPU it drops the barriers of jax.checkpoint.
        after = jnp.minimum(jnp.abs(cotangents[0].ravel()[:1].sum()), 0)
        return jax.vjp(call, parameters, residual + after.astype(residual.dtype), state)[1](cotangents)

    recomputed = jax.custom_vjp(call)
    recomputed.defvjp(lambda *inputs: (call(*inputs), inputs), backward)
    return recomputed(parameters, residual, state)


MIXERS = {"mamba": MambaMixer, "minimamba": MambaMixer}
