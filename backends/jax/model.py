"""What the models of all tasks share: embedding, blocks, final norm. `weights` has the canonical names."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mamba_core import architectures, routing, tasks
from mamba_core.backend import State
from mamba_core.backends.jax import ops, stack
from mamba_core.backends.jax import state as states
from mamba_core.backends.jax.arrays import as_array
from mamba_core.backends.jax.blocks import Block, RMSNorm
from mamba_core.backends.jax.heads import model_class
from mamba_core.backends.jax.layers import in_dtype
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.positions import call_of
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.observe import reporting
from mamba_core.spec.checks import check_state
from mamba_core.spec.params import parameter_table
from mamba_core.tasks.base import EMBEDDING, FINAL_NORM


class Backbone(nnx.Module):
    """The residual blocks, with an embedding before them and a norm behind them where the task has these."""

    def __init__(self, config, options: Options):
        self.remat = False
        self.dtype = options.dtype
        self.residual_dtype = "float32" if config.residual_in_fp32 else options.dtype
        table = parameter_table(config)
        embeds, norms = EMBEDDING in table, FINAL_NORM in table
        of_table = {"dtype": options.dtype, "param_dtype": options.dtype, "rngs": options.rngs}
        self.vocabulary = config.padded_vocab_size
        self.embeddings = nnx.Embed(config.padded_vocab_size, config.d_model, **of_table) if embeds else None
        kinds = architectures.of(config).blocks(config)
        self.layers = nnx.List([Block(config, layer, *kind, options) for layer, kind in enumerate(kinds)])
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, options.dtype) if norms else None

    def __call__(self, inputs: jax.Array, state: State, call: Call) -> tuple[jax.Array, State]:
        """hidden (b, l, d), or where only the last position is asked for perhaps (b, 1, d); and the state after it.

        inputs: (b, l) ids, or (b, l, d) floats, which take the place of their embeddings.
        """
        residual = inputs if self.embeddings is None else call.observe("embedding", self._embedded(inputs))
        residual, entering = residual.astype(self.residual_dtype), states.entering(state, call)
        if call.last and self.norm_f is not None and not untouched(RMSNorm, self.norm_f):
            call = call._replace(last=False)
        residual, pending, layers = stack.run(self.layers, residual, entering, call, self.remat)
        residual = residual if pending is None else residual + pending
        hidden = in_dtype(self.dtype, residual if self.norm_f is None else self.norm_f(residual))
        hidden = hidden if self.norm_f is None else call.observe("norm_f", hidden)
        return hidden, states.leaving(layers, state, call)

    def _embedded(self, inputs):
        """Of ids, NaN for one outside the vocabulary: indexing would take negative ids from the end."""
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            return inputs
        known = (inputs >= 0) & (inputs < getattr(self.embeddings, "num_embeddings", self.vocabulary))
        return jnp.where(known[..., None], self._rows(inputs), jnp.nan)

    def _rows(self, input_ids):
        embeddings = self.embeddings
        if not untouched(nnx.Embed, embeddings):
            return embeddings(input_ids)
        dtypes = {str(value) for value in (self.dtype, embeddings.dtype, embeddings.embedding[...].dtype)}
        if dtypes != {"bfloat16"}:
            return embeddings(input_ids)
        # Tied to the ids, because in a loop over tokens XLA would make the whole table float32 first to look them up.
        input_ids, table = lax.optimization_barrier((input_ids, embeddings.embedding[...]))
        return jnp.take(table, input_ids, axis=0)


class Model(nnx.Module):
    """What the tasks share. Fast under `nnx.jit`; without it, it runs operation by operation."""

    backend = "jax"

    def __init__(self, config, options: Options):
        self.config = config
        self.task = tasks.of(config)
        self.dtype = options.dtype
        self.policy = options.kernels
        self.backbone = Backbone(config, options)

    @property
    def device(self) -> str:
        parameter = next(value for _, value in nnx.iter_graph(self) if isinstance(value, nnx.Param))
        return next(iter(parameter[...].devices())).platform

    @property
    def remat(self) -> bool:
        return getattr(self.backbone, "remat", False)

    @remat.setter
    def remat(self, value: bool) -> None:
        if not isinstance(self.backbone, Backbone):
            raise TypeError(f"the backbone is {type(self.backbone).__name__}, which decides itself what it recomputes")
        self.backbone.remat = value

    @property
    def is_built(self) -> bool:
        """Whether the model itself is as it was built, so that backbone and head are all that its call does."""
        return untouched(model_class(self.config.task), self)

    @property
    def kernels(self) -> dict[str, str]:
        """The kernel of each op that the policy chooses on the model's device."""
        found = ops.available_kernels(self.device, self.dtype)
        return {op: choose(self.policy.of(op), names, op, "jax", self.device) for op, names in found.items()}

    def init_state(self, batch: int, room: int = 0) -> State:
        """Before the first position. room: how many positions a growing state has memory for."""
        return states.init_state(self.config, batch, self.dtype, room)

    def backbone_of(self, inputs: jax.Array, state: State, call: Call) -> tuple[jax.Array, State]:
        """The backbone's output, perhaps of the last position only, if that is all that is asked for."""
        self._check_dtypes()
        if call.last and not untouched(Backbone, self.backbone):
            call = call._replace(last=False)
        return self.backbone(inputs, state, call)

    def _run(self, inputs, inputs_embeds, state, mask, segment_ids, observe) -> tuple[jax.Array, State, Call]:
        """What comes before the head, the state after it, and the facts of the call."""
        inputs, kind = self.task.given(inputs, inputs_embeds)
        inputs, mask, segment_ids, _ = self._checked(inputs, mask, segment_ids, kind)
        observe = reporting(observe)
        return self._run_from(self._opened(inputs, observe), state, mask, segment_ids, observe)

    def _checked(self, inputs, mask, segment_ids, kind: str, **extras):
        """The arguments as arrays, and the extras by name."""
        inputs, mask = as_array(kind, inputs), as_array("mask", mask)
        segment_ids = as_array("segment_ids", segment_ids)
        extras = {name: as_array(name, value) for name, value in extras.items()}
        self.task.check(self.config, inputs, mask, segment_ids, kind, extras)
        return inputs, mask, segment_ids, extras

    def _run_from(self, inputs, state, mask, segment_ids, observe) -> tuple[jax.Array, State, Call]:
        """The same from what the backbone takes, checked: ids (b, l), or floats (b, l, d)."""
        batch, length = inputs.shape[:2]
        fresh = state is None
        if fresh:
            state = self.init_state(batch, length)
        else:
            check_state(self.config, batch, state)
            state = states.with_room(self.config, state, length)
        both = not architectures.traits(self.config).causal
        routers = None if self.config.balance is None else routing.collecting()
        how = {"observe": observe, "fresh": fresh, "both": both, "routers": routers}
        call = call_of(mask, segment_ids, length=length, **how)
        return *self.backbone_of(inputs, state, call), call

    def _check_dtypes(self):
        """Refuses parameters in float64, which the layers would round: each computes in the dtype that it was given."""
        if not jax.config.jax_enable_x64:
            return
        for path, variable in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            if variable.get_raw_value().dtype == jnp.float64:
                raise TypeError(
                    f"{'.'.join(map(str, path))} is float64, and the model computes in {self.dtype}; "
                    "give the parameters their dtype back"
                )

    def _opened(self, inputs, observe):
        """What the backbone is given, of the task's inputs."""
        return inputs

    def _masked(self, values, mask):
        if mask is not None:
            values = jnp.where(mask[..., None], values, 0.0)
        return values
