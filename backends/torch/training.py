"""Loss, gradients and the AdamW step, by `torch.optim`."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from mamba_core import routing
from mamba_core.backends.torch import losses
from mamba_core.backends.torch.arrays import dtype_name, from_numpy, to_numpy
from mamba_core.backends.torch.heads import find
from mamba_core.backends.torch.kernels.cuda_graph import CapturedStep
from mamba_core.backends.torch.ways import own
from mamba_core.backends.torch.weights import check_stored, foreign
from mamba_core.merging import check_held
from mamba_core.spec.params import parameter_table
from mamba_core.tasks import check_trains
from mamba_core.wrappers import checked_output


def loss(model, batch, mask=None) -> torch.Tensor:
    """The loss of the model's task.

    batch: of a labelled task a dict of tensors, else inputs (b, l + 1); mask (b, l + 1) is of these.
    """
    head = find(model.config.task)
    if not model.task.labelled:
        return head.loss_of_inputs(model, batch, mask)
    return head.loss(model.task, _output(model, batch), batch["targets"], batch.get("mask"))


def _output(model, batch):
    """What the model's call gives of a labelled task's batch."""
    given = {name: value for name, value in batch.items() if name not in ("inputs", "targets")}
    return checked_output(model, model(batch["inputs"], **given))


def objective(model, batch, mask=None) -> torch.Tensor:
    """What training makes small: `loss`, and where the config has one that of the routers."""
    counts = batch.get("mask") if isinstance(batch, dict) else None if mask is None else mask[:, :-1]
    balance = functools.partial(losses.balance_loss, mask=counts)
    return routing.objective(model.config, functools.partial(loss, model, batch, mask), balance)


def loss_and_gradients(model, batch, mask=None) -> tuple[float, dict[str, np.ndarray]]:
    check_trains(model.config, "its loss")
    check_held(model.config, foreign(model))
    batch = _entering(model, batch)
    parameters = {name: model.get_parameter(name) for name in parameter_table(model.config)}
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        value = objective(model, batch, None if mask is None else from_numpy(mask, device=model.device))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    gradients = torch.autograd.grad(value, parameters.values())
    return value.item(), {name: to_numpy(gradient) for name, gradient in zip(parameters, gradients, strict=True)}


class Trainer:
    """AdamW, its moments and its arithmetic in float32, of the parameters that require a gradient."""

    def __init__(self, model, settings):
        check_trains(model.config, "training")
        self.model = model
        self.settings = settings
        # The optimizer's view: the parameters themselves, or float32 copies of those in half precision.
        self.parameters = _trained(model)
        self.updated = {name: _in_float32(parameter) for name, parameter in self.parameters.items()}
        self.count = 0
        self.on_gpu = all(parameter.is_cuda for parameter in self.updated.values())
        # On a GPU the optimizer reads the rate from the device, so that a step can be captured.
        self.rate = torch.zeros((), device=model.device) if self.on_gpu else 0.0
        self.optimizer = self._optimizer()
        self.captured = CapturedStep(self._update)

    def step(self, batch) -> tuple[float, float]:
        """On a GPU, after some steps with a batch's shape, a replay of a CUDA graph: the model must stay as it is."""
        batch, rate = _entering(self.model, batch), self.settings.rate(self.count)
        if self.on_gpu:
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        found = self.captured(batch, self._settings()) if self.captures(batch) else self._update(batch)
        self.count += 1
        # The only place where the host waits for the device.
        value, norm = found.tolist()
        return value, norm

    def evaluate(self, batch, counts=None) -> float:
        batch = _entering(self.model, batch)
        with _evaluation_form(self.model), torch.no_grad():
            if self.model.task.labelled:
                return loss(self.model, batch).item()
            counts, head = from_numpy(counts, device=self.model.device), find(self.model.config.task)
            return head.summed_loss_of_inputs(self.model, batch, counts).item()

    def predict(self, batch) -> np.ndarray:
        batch = _entering(self.model, batch)
        with _evaluation_form(self.model), torch.no_grad():
            return to_numpy(_output(self.model, batch)[0])

    def captures(self, batch: torch.Tensor | dict[str, torch.Tensor] | None) -> bool:
        """Whether a step is captured: on a GPU, of a model as built, whose mixers have been tried in captured steps.

        The head of a labelled task says so too: it may need the host to compute its loss of such a batch.
        """
        model = self.model
        if not (self.on_gpu and model.is_untouched() and model.backbone.is_untouched() and model.has_own_ends()):
            return False
        if model.task.labelled:
            tried = getattr(find(model.config.task), "captures", None)
            if tried is None or not tried(model, batch):
                return False
        parts = [part for block in model.backbone.layers for part in (block.mixer, block.feed_forward)]
        asked = [(own(part, "captures"), part) for part in parts if part is not None]
        return all(tried is not None and tried(part) for tried, part in asked)

    def _update(self, batch) -> torch.Tensor:
        """One update; the loss and the gradient's norm, (2,)."""
        # Autocast caches casts of parameters, which have changed since.
        torch.clear_autocast_cache()
        self.model.zero_grad()
        value = objective(self.model, batch)
        value.backward()
        halves = [name for name, parameter in self.parameters.items() if self.updated[name] is not parameter]
        for name in halves:
            self.updated[name].data.copy_(self.parameters[name].data)
            gradient = self.parameters[name].grad
            self.updated[name].grad = None if gradient is None else gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(self.updated.values(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["capturable"] = self.on_gpu and torch.cuda.is_current_stream_capturing()
        self.optimizer.step()
        for name in halves:
            self.parameters[name].data.copy_(self.updated[name].data)
        return torch.stack([value.detach(), norm])

    def _settings(self) -> tuple:
        """What a captured step depends on besides the shape of its batch."""
        device = torch.device(self.model.device).type
        return self.model.remat, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, np.ndarray]:
        arrays = {"step": np.array(self.count, np.int64)}
        for name, parameter in self.updated.items():
            moments = self.optimizer.state.get(parameter, {})
            for prefix, key in _MOMENTS.items():
                arrays[f"{prefix}.{name}"] = to_numpy(moments.get(key, torch.zeros_like(parameter)))
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.count = int(state["step"])
        self.captured.forget()
        for name, parameter in self.updated.items():
            moments = {key: _like(state[f"{prefix}.{name}"], parameter) for prefix, key in _MOMENTS.items()}
            device = parameter.device if self.on_gpu else "cpu"
            self.optimizer.state[parameter] = moments | {"step": torch.tensor(float(self.count), device=device)}

    def _optimizer(self) -> torch.optim.AdamW:
        s, table = self.settings, parameter_table(self.model.config)
        decays = {name: table[name].decay if name in table else value.ndim > 1 for name, value in self.updated.items()}
        groups = [
            {
                "params": [value for name, value in self.updated.items() if decays[name] == decay],
                "weight_decay": s.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=self.rate, betas=(s.beta1, s.beta2), eps=s.eps, fused=self.on_gpu)


_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}


@contextmanager
def _evaluation_form(model) -> Iterator[None]:
    """Within it the model is in evaluation form. Afterwards modes, buffers and random numbers are as they were."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [(module, name, value) for module in modules for name, value in module.named_buffers(recurse=False)]
    values = [value.clone() for *_, value in buffers]
    device = torch.device(model.device)
    # Autocast keeps casts that it has made without a gradient.
    torch.clear_autocast_cache()
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            setattr(module, name, buffer)
            buffer.data.copy_(value)
        torch.clear_autocast_cache()


def _trained(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that require a gradient, those of the table first, in its order."""
    check_stored(model)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError("no parameter of the model requires a gradient; call requires_grad_() on those to be trained")
    return {name: found[name] for name in parameter_table(model.config) if name in found} | found


def _entering(model, batch) -> torch.Tensor | dict[str, torch.Tensor]:
    """A batch as the model's tensors, checked where the task is labelled."""
    if not model.task.labelled:
        return from_numpy(batch, device=model.device)
    checked = model.task.checked_batch(model.config, batch)
    return {name: from_numpy(value, device=model.device) for name, value in checked.items()}


def _in_float32(parameter):
    """The parameter itself where it is not in half precision."""
    return torch.nn.Parameter(parameter.detach().float()) if parameter.dtype.itemsize < 4 else parameter


def _like(value, parameter):
    return from_numpy(value, dtype=dtype_name(parameter), device=str(parameter.device))
