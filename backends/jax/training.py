"""Loss, gradients and the AdamW step, by optax."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mamba_core import routing
from mamba_core.backends.jax import losses
from mamba_core.backends.jax.arrays import from_numpy, to_numpy
from mamba_core.backends.jax.heads import find
from mamba_core.backends.jax.programs import after_call, divided, methods, methods_in, put_back, whole
from mamba_core.backends.jax.weights import Path, at, canonical, entering, foreign, named, table_paths
from mamba_core.merging import check_held
from mamba_core.spec.params import parameter_table
from mamba_core.tasks import check_trains
from mamba_core.wrappers import checked_output


def loss(model, batch, mask: jax.Array | None = None) -> jax.Array:
    """The loss of the model's task.

    batch: of a labelled task a dict of arrays, else inputs (b, l + 1); mask (b, l + 1) is of these.
    """
    head = find(model.config.task)
    if not model.task.labelled:
        return head.loss_of_inputs(model, batch, mask)
    return head.loss(model.task, _output(model, batch), batch["targets"], batch.get("mask"))


def _output(model, batch):
    """What the model's call gives of a labelled task's batch."""
    given = {name: value for name, value in batch.items() if name not in ("inputs", "targets")}
    return checked_output(model, model(batch["inputs"], **given))


def objective(model, batch, mask=None) -> jax.Array:
    """What training makes small: `loss`, and where the config has one that of the routers."""
    counts = batch.get("mask") if isinstance(batch, dict) else None if mask is None else mask[:, :-1]
    balance = functools.partial(losses.balance_loss, mask=counts)
    return routing.objective(model.config, functools.partial(loss, model, batch, mask), balance)


def loss_and_gradients(model, batch, mask=None) -> tuple[float, dict[str, np.ndarray]]:
    check_trains(model.config, "its loss")
    check_held(model.config, foreign(model))
    batch, mask = _entering(model, batch), None if mask is None else from_numpy(mask, device=model.device)
    value, gradients = _loss_and_gradients(model, batch, mask, methods=methods_in(nnx.graphdef(model)))
    return float(value), {name: canonical(model, name, gradient) for name, gradient in named(model, gradients).items()}


@functools.partial(nnx.jit, static_argnames="methods")
def _loss_and_gradients(model, batch, mask, methods):
    return nnx.value_and_grad(objective)(model, batch, mask)


class _Trained(NamedTuple):
    """A parameter that is trained. canonical: its name in the table, None for one of others."""

    path: Path
    canonical: str | None
    decay: bool


class Trainer:
    """AdamW with the decay of the parameter table; the moments are float32.

    It trains every `nnx.Param` of floats, but only the `nnx.LoRAParam`s of a model that has any.
    """

    def __init__(self, model, settings):
        check_trains(model.config, "training")
        self.model = model
        self.settings = settings
        self._compile()
        self.moments = _optimizer(self.trained, settings).init(_float32(self._values()))
        self._begin(0)

    def step(self, batch) -> tuple[float, float]:
        """The model must keep its modules: looking for others would take the host as long as a step takes a GPU."""
        if self._seen() != self.seen:
            self._compile()
        batch, rate = _entering(self.model, batch), self.settings.rate(self.count)
        found, values, left, self.moments = self.update(self._values(), self._rest(), self.moments, batch, rate)
        for name, place in self.places.items():
            _variable(place).set_raw_value(values[name])
        put_back(self.model, left)
        self.count += 1
        value, norm = np.asarray(found).tolist()
        return value, norm

    def evaluate(self, batch, counts=None) -> float:
        """Of a copy, whose modes, variables and random numbers are not those of the model."""
        if self._seen() != self.seen:
            self._compile()
        batch = _entering(self.model, batch)
        counts = None if counts is None else from_numpy(counts, device=self.model.device)
        return float(self.evaluation(self._values(), self._rest(), batch, counts))

    def predict(self, batch) -> np.ndarray:
        """Of a copy, as `evaluate`."""
        if self._seen() != self.seen:
            self._compile()
        batch = _entering(self.model, batch)
        del batch["targets"]
        return to_numpy(self.prediction(self._values(), self._rest(), batch))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        table = parameter_table(self.model.config)
        own = {name: table[each.canonical].shape for name, each in self.trained.items() if each.canonical}
        return {name: own.get(name, value.shape) for name, value in self._values().items()}

    def state(self) -> dict[str, np.ndarray]:
        arrays = {"step": np.array(self.count, np.int64)}
        moments = {prefix: optax.tree_utils.tree_get(self.moments, key) for prefix, key in _MOMENTS.items()}
        for name, each in self.trained.items():
            for prefix, values in moments.items():
                value = values[name]
                arrays[f"{prefix}.{name}"] = canonical(self.model, name, value) if each.canonical else to_numpy(value)
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        moments = {key: self._moments(prefix, state) for prefix, key in _MOMENTS.items()}
        self._begin(int(state["step"]), **moments)

    def _compile(self):
        """Compiles for the model's modules as they are."""
        graph, state = nnx.split(self.model)
        variables = dict(nnx.to_flat_state(state))
        self.trained = _trained(self.model, variables)
        by_path = {each.path: name for name, each in self.trained.items()}
        places = {keys: (at(self.model, keys[:-1]), keys[-1]) for keys in variables}
        self.places = {name: places[keys] for keys, name in by_path.items()}
        self.others = {keys: place for keys, place in places.items() if keys not in by_path}
        self.classes = tuple(dict.fromkeys(type(module) for _, module in nnx.iter_modules(self.model)))
        self.seen = self._seen()
        self.update = _compiled(graph, methods_in(graph), tuple(self.trained.items()), self.settings)
        self.evaluation = _compiled_evaluation(graph, methods_in(graph), tuple(self.trained.items()))
        self.prediction = _compiled_prediction(graph, methods_in(graph), tuple(self.trained.items()))

    def _seen(self):
        """What else than the modules the compiled update depends on."""
        return id(self.model), self.model.remat, tuple(map(methods, self.classes))

    def _values(self) -> dict[str, jax.Array]:
        return {name: _variable(place).get_raw_value() for name, place in self.places.items()}

    def _rest(self) -> nnx.State:
        return nnx.from_flat_state((keys, _variable(place)) for keys, place in self.others.items())

    def _begin(self, count, **moments):
        self.count = count
        # On the device where the step leaves it; otherwise the second step compiles again.
        placed = from_numpy(count, dtype="int32", device=self.model.device)
        self.moments = optax.tree_utils.tree_set(self.moments, count=placed, **moments)

    def _moments(self, prefix, state) -> dict[str, jax.Array]:
        moments = {}
        for name, each in self.trained.items():
            value = np.asarray(state[f"{prefix}.{name}"])
            value = entering(self.model, name, value) if each.canonical else value
            moments[name] = from_numpy(value, dtype="float32", device=self.model.device)
        return moments


_MOMENTS = {"m": "mu", "v": "nu"}


def _trained(model, variables) -> dict[str, _Trained]:
    """By name, those of the table first and in its order.

    Raises:
        ValueError: there are none.
    """
    found = {keys: value for keys, value in variables.items() if _is_trainable(value)}
    adapters = {keys: value for keys, value in found.items() if isinstance(value, nnx.LoRAParam)}
    found = adapters or found
    if not found:
        raise ValueError("nothing of the model is trainable: it has no nnx.Param of floating-point numbers")
    names, table = table_paths(model), parameter_table(model.config)
    own = {name: _Trained(keys, name, table[name].decay) for keys, name in names.items() if keys in found}
    others = {keys: value.get_raw_value().ndim >= 2 for keys, value in found.items() if keys not in names}
    return own | {".".join(map(str, keys)): _Trained(keys, None, decay) for keys, decay in others.items()}


def _is_trainable(variable) -> bool:
    dtype = getattr(variable.get_raw_value(), "dtype", None)
    return isinstance(variable, nnx.Param) and dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _entering(model, batch) -> jax.Array | dict[str, jax.Array]:
    """A batch as arrays on the model's device, checked where the task is labelled."""
    if not model.task.labelled:
        return from_numpy(batch, device=model.device)
    checked = model.task.checked_batch(model.config, batch)
    return {name: from_numpy(value, device=model.device) for name, value in checked.items()}


def _variable(place) -> nnx.Variable:
    """What stands there now; another variable may have been put there."""
    owner, key = place
    return at(owner, (key,))


def _optimizer(trained: Mapping[str, _Trained], s) -> optax.GradientTransformation:
    """AdamW up to the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        optax.scale_by_adam(s.beta1, s.beta2, s.eps),
        optax.add_decayed_weights(s.weight_decay, mask={name: each.decay for name, each in trained.items()}),
    )


@functools.lru_cache(maxsize=8)
def _compiled(graph, methods, trained, settings):
    """The update of the model with that graph, whose classes have these methods. trained: (name, which) of each."""
    trained = dict(trained)

    @functools.partial(jax.jit, donate_argnames=("values", "moments"))
    def update(values, others, moments, batch, rate):
        """(loss and norm of the gradient, values, what a call changed, moments); values by name."""

        def error(values):
            _, before, rest = divided(_assembled(graph, trained, values, others))
            model = whole(graph, before, rest)
            value = objective(model, batch)
            return value, after_call(model, graph, before)

        (value, left), gradients = jax.value_and_grad(error, has_aux=True)(values)
        gradients, before = _float32(gradients), _float32(values)
        updates, moments = _optimizer(trained, settings).update(gradients, moments, before)
        after = {name: (before[name] - rate * updates[name]).astype(values[name].dtype) for name in values}
        return jnp.stack([value, optax.global_norm(gradients)]), after, left, moments

    return update


@functools.lru_cache(maxsize=8)
def _compiled_evaluation(graph, methods, trained):
    """The loss in evaluation form, summed where the task is not labelled; arguments as of `_compiled`."""
    trained = dict(trained)

    @jax.jit
    def evaluation(values, others, batch, counts):
        model = _assembled(graph, trained, values, others)
        model.eval()
        if model.task.labelled:
            return loss(model, batch)
        return find(model.config.task).summed_loss_of_inputs(model, batch, counts)

    return evaluation


@functools.lru_cache(maxsize=8)
def _compiled_prediction(graph, methods, trained):
    """The output in evaluation form; arguments as of `_compiled`."""
    trained = dict(trained)

    @jax.jit
    def prediction(values, others, batch):
        model = _assembled(graph, trained, values, others)
        model.eval()
        return _output(model, batch)[0]

    return prediction


def _assembled(graph, trained, values, others) -> nnx.Module:
    """The module of these: values are arrays, which the graph makes the variables that they were."""
    return whole(graph, nnx.from_flat_state((trained[name].path, value) for name, value in values.items()), others)


def _float32(arrays):
    return jax.tree.map(lambda value: value.astype(jnp.float32), arrays)
