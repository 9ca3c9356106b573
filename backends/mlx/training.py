"""Loss, gradients and the AdamW step, by `mlx.optimizers`."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mamba_core import routing
from mamba_core.backends.mlx import losses
from mamba_core.backends.mlx.arrays import from_numpy, random_key, set_random_key, to_numpy
from mamba_core.backends.mlx.heads import find
from mamba_core.backends.mlx.weights import canonical, convolution_weights, foreign, swap_axes
from mamba_core.merging import check_held
from mamba_core.spec.params import parameter_table
from mamba_core.tasks import check_trains
from mamba_core.wrappers import checked_output


def loss(model, batch, mask=None) -> mx.array:
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


def objective(model, batch, mask=None) -> mx.array:
    """What training makes small: `loss`, and where the config has one that of the routers."""
    counts = batch.get("mask") if isinstance(batch, dict) else None if mask is None else mask[:, :-1]
    balance = functools.partial(losses.balance_loss, mask=counts)
    return routing.objective(model.config, functools.partial(loss, model, batch, mask), balance)


def loss_and_gradients(model, batch, mask=None) -> tuple[float, dict[str, np.ndarray]]:
    check_trains(model.config, "its loss")
    check_held(model.config, foreign(model))
    batch, mask = _entering(model, batch), None if mask is None else from_numpy(mask)
    with model.on_device(), _unfrozen(model):
        value, gradients = nn.value_and_grad(model, objective)(model, batch, mask)
    return value.item(), dict(canonical(model, tree_flatten(gradients, destination={})))


@contextmanager
def _unfrozen(model):
    """Within it all parameters are trainable."""
    frozen = [(module, set(module._no_grad)) for module in model.modules() if module._no_grad]
    for module, _ in frozen:
        module._no_grad.clear()
    try:
        yield
    finally:
        for module, names in frozen:
            module._no_grad.update(names)


class Trainer:
    """AdamW with the decay of the parameter table, its moments and its arithmetic in float32.

    It trains the parameters that are not frozen.
    """

    def __init__(self, model, settings):
        check_trains(model.config, "training")
        trained = model.trainable_parameters()
        if not tree_flatten(trained):
            raise ValueError("nothing of the model is trainable: all of its parameters are frozen; unfreeze some")
        self.model = model
        self.settings = settings
        self.count = 0
        self.optimizer = self._optimizer()
        self.optimizer.init(tree_map(lambda value: mx.zeros(value.shape), trained))
        # Not on a CPU: there the C++ compiler takes as long for the fused operations as hundreds of steps.
        if model.device == "gpu":
            state = [model.state, self.optimizer.state, mx.random.state]
            self._update = mx.compile(self._update, inputs=state, outputs=state)

    def step(self, batch) -> tuple[float, float]:
        self.optimizer.learning_rate = self.settings.rate(self.count)
        with self.model.on_device():
            value, norm = self._update(_entering(self.model, batch))
            mx.eval(value, norm, self.model.state, self.optimizer.state)
        self.count += 1
        return value.item(), norm.item()

    def evaluate(self, batch, counts=None) -> float:
        """Not compiled: there is no gradient whose operations a compiler could fuse."""
        model, batch = self.model, _entering(self.model, batch)
        with model.on_device(), _evaluation_form(model):
            if model.task.labelled:
                return loss(model, batch).item()
            return find(model.config.task).summed_loss_of_inputs(model, batch, from_numpy(counts)).item()

    def predict(self, batch) -> np.ndarray:
        """Not compiled, as `evaluate`."""
        model, batch = self.model, _entering(self.model, batch)
        with model.on_device(), _evaluation_form(model):
            return to_numpy(_output(model, batch)[0])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        convolutions, shapes = convolution_weights(self.model), {}
        for name, value in tree_flatten(self.model.trainable_parameters()):
            first, *others = value.shape
            shapes[name] = (first, *others[::-1]) if name in convolutions else value.shape
        return shapes

    def state(self) -> dict[str, np.ndarray]:
        arrays, convolutions = {"step": np.array(self.count, np.int64)}, convolution_weights(self.model)
        for path, value in self._slots():
            name, _, moment = path.rpartition(".")
            if moment in _MOMENTS:
                array = to_numpy(value)
                arrays[f"{moment}.{name}"] = swap_axes(array) if name in convolutions else array
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.count = int(state["step"])
        convolutions = convolution_weights(self.model)

        def stored(path, value):
            name, _, moment = path.rpartition(".")
            if moment not in _MOMENTS:
                return mx.array(self.count, value.dtype) if path == "step" else value
            array = state[f"{moment}.{name}"]
            return from_numpy(swap_axes(array) if name in convolutions else array, dtype="float32")

        for optimizer in self.optimizer.optimizers:
            # In place: the compiled step holds on to these dictionaries.
            optimizer.state.update(tree_map_with_path(stored, optimizer.state))

    def _update(self, batch) -> tuple[mx.array, mx.array]:
        value, gradients = nn.value_and_grad(self.model, objective)(self.model, batch)
        gradients = tree_map(lambda gradient: gradient.astype(mx.float32), gradients)
        gradients, norm = optim.clip_grad_norm(gradients, self.settings.clip_norm)
        updated = self.optimizer.apply_gradients(gradients, self.model)
        self.model.update(tree_map(lambda new, old: new.astype(old.dtype), updated, self.model))
        return value, norm

    def _slots(self) -> list[tuple[str, mx.array]]:
        """(path, array) of all that the optimizers keep. A moment's path is its parameter's name, then "m" or "v"."""
        return [slot for optimizer in self.optimizer.optimizers for slot in tree_flatten(optimizer.state)]

    def _optimizer(self) -> optim.MultiOptimizer:
        s, table = self.settings, parameter_table(self.model.config)

        def adamw(weight_decay):
            return optim.AdamW(s.learning_rate, [s.beta1, s.beta2], s.eps, weight_decay, bias_correction=True)

        def decays(name, value):
            return table[name].decay if name in table else value.ndim >= 2

        return optim.MultiOptimizer([adamw(s.weight_decay), adamw(0.0)], [decays])


_MOMENTS = ("m", "v")


@contextmanager
def _evaluation_form(model) -> Iterator[None]:
    """Within it the model is in evaluation form. Afterwards modes, arrays and random numbers are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    arrays, key = model.parameters(), random_key()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module._set_training_mode(mode)
        model.update(arrays)
        set_random_key(key)


def _entering(model, batch) -> mx.array | dict[str, mx.array]:
    """A batch as MLX's arrays, ids in range: MLX does not check an index, and reads whatever memory is there."""
    if model.task.labelled:
        checked = model.task.checked_batch(model.config, batch)
        return {name: from_numpy(value) for name, value in checked.items()}
    rows = model.config.padded_vocab_size
    if batch.size and (batch.min() < 0 or batch.max() >= rows):
        raise ValueError(f"tokens are from {batch.min()} to {batch.max()}; expected 0 to {rows - 1}")
    return from_numpy(batch)
