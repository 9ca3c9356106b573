"""Loss, gradients and the AdamW step, by optax."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mamba_core.backends.jax.arrays import from_numpy
from mamba_core.backends.jax.weights import assign, canonical, named, transposed
from mamba_core.spec.checks import check_task
from mamba_core.spec.params import parameter_table


def loss(model, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy of tokens[:, 1:] given tokens[:, :-1] over the targets that count; tokens (b, l+1)."""
    logits = model(tokens[:, :-1], mask=None if mask is None else mask[:, :-1]).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(where=None if mask is None else mask[:, 1:])


def loss_and_gradients(model, tokens, mask=None) -> tuple[float, dict[str, np.ndarray]]:
    check_task(model.config, "its loss")
    tokens, mask = (None if given is None else from_numpy(given, device=model.device) for given in (tokens, mask))
    value, gradients = _loss_and_gradients(model, tokens, mask)
    return float(value), {name: canonical(model, name, gradient) for name, gradient in named(model, gradients).items()}


_loss_and_gradients = nnx.jit(nnx.value_and_grad(loss))


class Trainer:
    """AdamW with the decay of the parameter table; the moments are float32."""

    def __init__(self, model, settings):
        check_task(model.config, "training")
        self.model = model
        self.settings = settings
        parameters = named(model, nnx.state(model, nnx.Param))
        self.moments = _optimizer(model.config, settings).init(_float32(parameters))
        self._begin(0)

    def step(self, tokens) -> tuple[float, float]:
        tokens, rate = from_numpy(tokens, device=self.model.device), self.settings.rate(self.count)
        value, norm, self.moments = _update(self.model, self.moments, tokens, rate, settings=self.settings)
        self.count += 1
        return float(value), float(norm)

    def state(self) -> dict[str, np.ndarray]:
        arrays = {"step": np.array(self.count, np.int64)}
        moments = {prefix: optax.tree_utils.tree_get(self.moments, key) for prefix, key in _MOMENTS.items()}
        for name in parameter_table(self.model.config):
            for prefix, values in moments.items():
                arrays[f"{prefix}.{name}"] = canonical(self.model, name, values[name])
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        moments = {key: self._moments(prefix, state) for prefix, key in _MOMENTS.items()}
        self._begin(int(state["step"]), **moments)

    def _begin(self, count, **moments):
        self.count = count
        # Placed where the step will leave it; otherwise the second step compiles again.
        placed = from_numpy(count, dtype="int32", device=self.model.device)
        self.moments = optax.tree_utils.tree_set(self.moments, count=placed, **moments)

    def _moments(self, prefix, state) -> dict[str, jax.Array]:
        values = {name: np.asarray(state[f"{prefix}.{name}"]) for name in parameter_table(self.model.config)}
        return {
            name: from_numpy(transposed(self.model, name, value), dtype="float32", device=self.model.device)
            for name, value in values.items()
        }


_MOMENTS = {"m": "mu", "v": "nu"}


def _optimizer(config, s) -> optax.GradientTransformation:
    """AdamW up to the learning rate."""
    decay = {name: parameter.decay for name, parameter in parameter_table(config).items()}
    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        optax.scale_by_adam(s.beta1, s.beta2, s.eps),
        optax.add_decayed_weights(s.weight_decay, mask=decay),
    )


@functools.partial(nnx.jit, static_argnames="settings", donate_argnames=("model", "moments"))
def _update(model, moments, tokens, rate, *, settings):
    error, gradients = nnx.value_and_grad(loss)(model, tokens)
    gradients, values = _float32(named(model, gradients)), named(model, nnx.state(model, nnx.Param))
    updates, moments = _optimizer(model.config, settings).update(gradients, moments, _float32(values))
    for name, value in values.items():
        assign(model, name, (value - rate * updates[name]).astype(value.dtype))
    return error, optax.global_norm(gradients), moments


def _float32(arrays):
    return jax.tree.map(lambda value: value.astype(jnp.float32), arrays)
