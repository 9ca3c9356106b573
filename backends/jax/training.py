"""Loss, gradients and the AdamW step, by optax."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mamba_core.backends.jax.arrays import from_numpy
from mamba_core.backends.jax.ops.cross_entropy import linear_cross_entropy
from mamba_core.backends.jax.weights import canonical, entering, named, path, place
from mamba_core.spec.checks import check_targets
from mamba_core.spec.params import parameter_table
from mamba_core.tasks import check_trains


def loss(model, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy of tokens[:, 1:] given tokens[:, :-1] over the targets that count; tokens (b, l+1)."""
    check_targets(tokens)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    counts = jnp.ones(targets.shape, bool)
    if mask is not None:
        mask, counts = mask[:, :-1], mask[:, 1:]
    if (weight := model.head_weight()) is None:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens, mask=mask).logits, targets)
        return losses.mean(where=counts)
    hidden = model.hidden(tokens, mask)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return linear_cross_entropy(hidden, weight, targets.ravel(), counts.ravel()) / counts.sum()


def loss_and_gradients(model, tokens, mask=None) -> tuple[float, dict[str, np.ndarray]]:
    check_trains(model.config, "its loss")
    tokens, mask = (None if given is None else from_numpy(given, device=model.device) for given in (tokens, mask))
    value, gradients = _loss_and_gradients(model, tokens, mask)
    return float(value), {name: canonical(model, name, gradient) for name, gradient in named(model, gradients).items()}


_loss_and_gradients = nnx.jit(nnx.value_and_grad(loss))


class Trainer:
    """AdamW with the decay of the parameter table; the moments are float32."""

    def __init__(self, model, settings):
        check_trains(model.config, "training")
        self.model = model
        self.settings = settings
        self._compile()
        parameters = named(model, nnx.state(model, nnx.Param))
        self.moments = _optimizer(model.config, settings).init(_float32(parameters))
        self._begin(0)

    def step(self, tokens) -> tuple[float, float]:
        """The model must keep its modules: looking for others would take the host as long as a step takes a GPU."""
        if self.model is not self.seen or self.model.remat != self.remat:
            self._compile()
        tokens, rate = from_numpy(tokens, device=self.model.device), self.settings.rate(self.count)
        variables = {name: getattr(*place) for name, place in self.places.items()}
        values = {name: variable.get_raw_value() for name, variable in variables.items()}
        found, values, self.moments = self.update(values, self.others, self.moments, tokens, rate)
        for name, variable in variables.items():
            variable.set_value(values[name])
        self.count += 1
        value, norm = np.asarray(found).tolist()
        return value, norm

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in parameter_table(self.model.config).items()}

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

    def _compile(self):
        """Compiles for the model's modules as they are."""
        places = {path(self.model, name): name for name in parameter_table(self.model.config)}
        graph, _, self.others = nnx.split(self.model, lambda place, _: place in places, ...)
        self.places = {name: place(self.model, name) for name in places.values()}
        self.seen, self.remat = self.model, self.model.remat
        self.update = _compiled(graph, tuple(places.items()), self.model.config, self.settings)

    def _begin(self, count, **moments):
        self.count = count
        # On the device where the step leaves it; otherwise the second step compiles again.
        placed = from_numpy(count, dtype="int32", device=self.model.device)
        self.moments = optax.tree_utils.tree_set(self.moments, count=placed, **moments)

    def _moments(self, prefix, state) -> dict[str, jax.Array]:
        values = {name: np.asarray(state[f"{prefix}.{name}"]) for name in parameter_table(self.model.config)}
        return {
            name: from_numpy(entering(self.model, name, value), dtype="float32", device=self.model.device)
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


@functools.lru_cache(maxsize=8)
def _compiled(graph, places, config, settings):
    """The update of the model with that graph. places: (path, canonical name) of each parameter."""

    @functools.partial(jax.jit, donate_argnames=("values", "moments"))
    def update(values, others, moments, tokens, rate):
        """(loss and norm of the gradient, values, moments); values: the parameters by canonical name."""

        def error(values):
            parameters = nnx.from_flat_state((place, nnx.Param(values[name])) for place, name in places)
            return loss(nnx.merge(graph, parameters, others), tokens)

        value, gradients = jax.value_and_grad(error)(values)
        gradients, before = _float32(gradients), _float32(values)
        updates, moments = _optimizer(config, settings).update(gradients, moments, before)
        after = {name: (before[name] - rate * updates[name]).astype(values[name].dtype) for name in values}
        return jnp.stack([value, optax.global_norm(gradients)]), after, moments

    return update


def _float32(arrays):
    return jax.tree.map(lambda value: value.astype(jnp.float32), arrays)
