"""Do implementations agree? Runs a checkpoint on backends and on the float64 reference and compares every node.

A backend runs the tokens whole ("forward"), in calls that go on from each other's state ("chunked"), one at a time
("stepped", the first few only) and, when asked, differentiates the mean cross-entropy ("backward"). All are held to one
run of the reference: a model that steps is causal, so that its values do not depend on where a call ends.
"""

import gc
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from mamba_core import architectures, registry, tasks
from mamba_core.config import COMPUTE_DTYPES
from mamba_core.spec.graph import block_graph
from mamba_core.spec.init import random_stream
from mamba_core.spec.params import parameter_count
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.tasks.base import IDS
from mamba_core.tokenizer import tokenizer_of
from mamba_core.weights.opening import open_model

STEPS = 8
# Parameters times tokens by default: 66 tokens of mamba-130m, which keeps --grad on three backends below two minutes on
# two cores.
WORK = 2**33


@dataclass(frozen=True)
class Comparison:
    """One way of running against the reference.

    errors: relative L2 error of every node of the block graph, or backward of the loss and of every parameter's
        gradient, in the order of computation; inf for one that is not finite, mis-shaped or missing.
    limits: what the tolerance table allows each.
    """

    errors: dict[str, float]
    limits: dict[str, float]
    seconds: float

    def worst(self, count: int = 1) -> list[str]:
        """The names whose errors are the largest parts of their limits, the worst first."""
        return sorted(self.errors, key=lambda name: -self.errors[name] / self.limits[name])[:count]

    @property
    def first_divergent(self) -> str | None:
        """The first, in the order of computation, whose error exceeds the limit."""
        return next((name for name, error in self.errors.items() if not error <= self.limits[name]), None)

    @property
    def passed(self) -> bool:
        return self.first_divergent is None

    def to_dict(self) -> dict:
        """For JSON, which has no infinity: null stands for it."""
        finite = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        found = {"passed": self.passed, "first_divergent": self.first_divergent, "worst": self.worst(3)}
        return found | {"seconds": self.seconds, "errors": finite, "limits": self.limits}


@dataclass(frozen=True)
class BackendParity:
    """One backend against the reference.

    kernels: op -> the kernel that computed it. modes: "forward", "chunked", "stepped" and, when asked for, "backward".
    """

    backend: str
    device: str
    kernels: dict[str, str]
    modes: dict[str, Comparison]

    @property
    def first_divergent(self) -> str | None:
        """The first divergent name of the first mode that has one."""
        return next((mode.first_divergent for mode in self.modes.values() if not mode.passed), None)

    @property
    def passed(self) -> bool:
        return all(mode.passed for mode in self.modes.values())

    def to_dict(self) -> dict:
        about = {"backend": self.backend, "device": self.device, "kernels": self.kernels, "passed": self.passed}
        return about | {"modes": {name: mode.to_dict() for name, mode in self.modes.items()}}


@dataclass(frozen=True)
class Parity:
    """What `parity` found.

    layers: how deep the model is. length: how many positions were run. tokens: the tokens that were run; empty for a
    model that takes embeddings. chunks: the lengths of the calls of "chunked". steps: how many of the first positions
    "stepped" ran. Both are empty or 0 for an architecture that has no steps.
    """

    dtype: str
    layers: int
    length: int
    tokens: list[int]
    chunks: list[int]
    steps: int
    backends: tuple[BackendParity, ...]

    @property
    def passed(self) -> bool:
        return all(entry.passed for entry in self.backends)

    def to_dict(self) -> dict:
        about = {"passed": self.passed, "dtype": self.dtype, "layers": self.layers, "length": self.length}
        about |= {"chunks": self.chunks, "steps": self.steps, "tokens": self.tokens}
        return about | {"backends": [entry.to_dict() for entry in self.backends]}


def parity(
    source: str | Path,
    *,
    backends: Sequence[str] | None = None,
    dtype: str = "float32",
    grad: bool = False,
    length: int | None = None,
    steps: int = STEPS,
    tokens: Sequence[int] | None = None,
    text: str | None = None,
    seed: int = 0,
    layout: str | None = None,
    revision: str | None = None,
    compat: str | None = None,
    log: Callable[[str], None] | None = None,
) -> Parity:
    """Compare backends with the float64 reference, node by node, on a checkpoint.

    Args:
        source, layout, revision, compat: the checkpoint, as `mamba_core.load` has them.
        backends: names; by default every one whose framework is installed.
        dtype: the compute dtype of the backends, which chooses the tolerance. The reference has the weights as stored.
        grad: compare the gradient of every parameter too.
        length: how many tokens to run; by default 16 to 128, the fewer the larger the model.
        steps: how many of them to run one at a time too, at most.
        tokens: ids to run, all of them unless a length is given. text: the same, for a checkpoint with a tokenizer.
        seed: of the random tokens that are run when neither is given, or of the embeddings for task "layers".
        log: called with a line as each part begins.

    Raises:
        ValueError: a setting out of range, an unknown backend, dtype, layout or compat, text without a tokenizer, grad
            of a model of a task without a loss.
        ImportError: a backend's framework is not installed.
        CheckpointError: as `mamba_core.load`.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    chosen = [registry.get(name) for name in (registry.installed() if backends is None else backends)]
    if not chosen:
        raise ValueError("no backend to compare; name one, or install a framework")
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source is {type(source).__name__}; expected a checkpoint's name. Save a model to compare it")
    opened = open_model(source, layout=layout, revision=revision, compat=compat)
    if grad:
        tasks.check_trains(opened.config, "grad")
    inputs = _inputs(opened, length, tokens, text, seed, least=2 if grad else 1)
    log = log or (lambda line: None)
    log("reference")
    reference = _reference(opened, inputs, grad)
    whole = tasks.of(opened.config).positions(inputs)
    steps = min(steps, whole)
    splits, chunks = {"forward": [0, whole]}, []
    if architectures.traits(opened.config).steps and tasks.of(opened.config).resumes:
        # One call in the middle, and a last one shorter than the window of a convolution.
        splits["chunked"] = sorted({0, whole // 2, max(whole - 2, 0), whole})
        splits["stepped"] = list(range(steps + 1))
        chunks = [stop - start for start, stop in pairwise(splits["chunked"])]
    else:
        steps = 0
    found = tuple(_compare(opened, backend, dtype, inputs, splits, reference, log) for backend in chosen)
    ran = inputs[0].tolist() if inputs.ndim == 2 else []
    return Parity(dtype, opened.config.n_layer, whole, ran, chunks, steps, found)


def default_length(config) -> int:
    return min(max(WORK // parameter_count(config), 16), 128)


def depth(name: str, layers: int) -> int:
    """Where a node or parameter stands: 0 embedding, i + 1 layer i, layers + 1 the final norm, layers + 2 the rest."""
    if layer := re.search(r"\blayers\.(\d+)\.", name):
        return int(layer[1]) + 1
    if "embedding" in name:
        return 0
    return layers + 1 if "norm" in name else layers + 2


class _Reference(NamedTuple):
    """nodes: the value of every node, (1, l, ...). gradients: by parameter, in the order in which they are complete."""

    nodes: dict[str, np.ndarray]
    loss: float | None
    gradients: dict[str, np.ndarray]


def _inputs(opened, length, tokens, text, seed, least: int) -> np.ndarray:
    """(1, l) tokens to run, or what else the task's model takes."""
    if length is not None and length < least:
        raise ValueError(f"length is {length}; expected at least {least}")
    task = tasks.of(opened.config)
    if task.inputs != IDS and (tokens is not None or text is not None):
        raise ValueError(
            f"{opened.folder}: a model of task {opened.config.task!r} takes {task.inputs}; give no tokens and no text"
        )
    if text is not None:
        tokenizer = tokenizer_of(SimpleNamespace(source=opened.folder, config=opened.config))
        if tokenizer is None:
            raise ValueError(f"{opened.folder}: no tokenizer.json and not a vocabulary of bytes; give no text")
        tokens = tokenizer.encode(text)
    if tokens is None:
        length = default_length(opened.config) if length is None else length
        return task.draw(opened.config, random_stream(seed, "parity"), 1, length)
    ids = np.array([tokens[:length]], np.int32)
    if ids.shape[1] < least:
        raise ValueError(f"{ids.shape[1]} tokens to run; expected at least {least}")
    return ids


def _reference(opened, inputs, grad: bool) -> _Reference:
    """The model in float64; its own copy of the parameters is gone when this returns."""
    nodes: dict[str, np.ndarray] = {}
    model = ReferenceModel(opened.config, dict(opened.tensors()))
    output = model(inputs, observe=nodes.__setitem__)[0]
    if not np.isfinite(output).all():
        raise ValueError(f"{opened.folder}: the reference's output is not finite, so there is nothing to compare with")
    if not grad:
        return _Reference(nodes, None, {})
    if tasks.of(opened.config).labelled:
        loss, doutput = model.task.loss(opened.config, output, _targets(opened.config, inputs))
        gradients, _ = model.vjp(doutput, inputs)
    else:
        loss, doutput = model.task.loss(opened.config, output[:, :-1], inputs[:, 1:])
        gradients, _ = model.vjp(doutput, inputs[:, :-1])
    # A gradient is complete at the first use of its parameter, which the way back reaches last.
    used = dict.fromkeys(name for node in block_graph(opened.config) for name in node.parameters.values())
    return _Reference(nodes, loss, {name: gradients[name] for name in reversed(used)})


def _compare(opened, backend, dtype: str, inputs, splits: dict, reference: _Reference, log) -> BackendParity:
    model = backend.build(opened.config, opened.tensors(), dtype=dtype)
    modes = {}
    for mode, bounds in splits.items():
        log(f"{model.backend} {mode}")
        modes[mode] = _forward(backend, model, inputs, bounds, reference.nodes)
    if reference.gradients:
        log(f"{model.backend} backward")
        modes["backward"] = _backward(backend, model, inputs, reference)
    found = BackendParity(model.backend, model.device, dict(model.kernels), modes)
    # Modules hold references in circles, and the next backend needs the memory.
    del model
    gc.collect()
    return found


def _forward(backend, model, inputs, bounds: list[int], nodes: dict) -> Comparison:
    """Run inputs[:, bounds[0]:bounds[-1]] in calls that end at the bounds, each going on from the state of the last.

    One call of the whole is given the inputs as they are, whose second axis need not be that of positions.
    """
    whole, pieces, state = tasks.of(model.config).positions(inputs), defaultdict(list), None
    started = time.perf_counter()
    for start, stop in pairwise(bounds):
        given = backend.from_numpy(inputs if stop - start == whole else inputs[:, start:stop], device=model.device)
        out = model(given, state, observe=lambda node, value: pieces[node].append(backend.to_numpy(value)))
        state = out.state
    seconds = time.perf_counter() - started
    of_rows, once = tasks.of(model.config).of_rows, len(bounds) == 2
    # Values of rows are those of all positions in the call that has all of them, and in no other.
    compared = {
        node: value if node in of_rows or bounds[-1] == whole else value[:, : bounds[-1]]
        for node, value in nodes.items()
        if once or node not in of_rows
    }
    errors = {node: _error(pieces.pop(node, []), value, node in of_rows) for node, value in compared.items()}
    *_, result = nodes  # the last node has the tolerance of a result
    limits = {node: _node_limit(node, result, model) for node in errors}
    return Comparison(errors, limits, seconds)


def _targets(config, inputs: np.ndarray) -> np.ndarray:
    """The same random targets each time."""
    return tasks.of(config).draw_targets(config, random_stream(0, "parity.targets"), *inputs.shape[:2])


def _error(pieces: list[np.ndarray], expected: np.ndarray, of_rows: bool) -> float:
    if of_rows:
        return relative_l2(pieces[0], expected) if [piece.shape for piece in pieces] == [expected.shape] else math.inf
    shapes = {piece.shape[2:] for piece in pieces}
    if shapes != {expected.shape[2:]} or sum(piece.shape[1] for piece in pieces) != expected.shape[1]:
        return math.inf
    return relative_l2(np.concatenate(pieces, axis=1), expected)


def _node_limit(node: str, result: str, model) -> float:
    layers = min(depth(node, model.config.n_layer), model.config.n_layer)
    return tolerance(model.dtype, "value" if node == result else "node", layers)


def _backward(backend, model, ids, reference: _Reference) -> Comparison:
    started = time.perf_counter()
    labelled = tasks.of(model.config).labelled
    batch = {"inputs": ids, "targets": _targets(model.config, ids)} if labelled else ids
    loss, gradients = backend.loss_and_gradients(model, batch)
    seconds = time.perf_counter() - started
    errors = {"loss": relative_l2(loss, reference.loss)}
    for name, expected in reference.gradients.items():
        given = gradients.get(name)
        same = given is not None and given.shape == expected.shape
        errors[name] = relative_l2(given, expected) if same else math.inf
    layers = model.config.n_layer
    limits = {name: tolerance(model.dtype, "value" if name == "loss" else "gradient", layers) for name in errors}
    return Comparison(errors, limits, seconds)
