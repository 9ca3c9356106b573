"""What a model's parameter table cannot hold, and adapters merged into the weights that it can hold.

A changed layer is merged by measuring: it is called with inputs that show its weights, and tried on random ones. So
any layer that still is a linear map, a causal convolution, a norm or a table of rows can be merged, whoever wrote it.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mamba_core.backend import Foreign
from mamba_core.spec.graph import block_graph
from mamba_core.spec.params import Parameter, Values, parameter_table
from mamba_core.spec.tolerances import relative_l2
from mamba_core.tasks.base import EMBEDDING

# A layer is shown this times the identity, so that its bias does not round its weights away; a power of two.
SCALE = 256.0
# The largest relative difference between a layer and what was measured of it, by the compute dtype.
TOLERANCE = {"float32": 1e-4, "float64": 1e-6}
HALF_TOLERANCE = 3e-2
SHOWN = 3

Call = Callable[[str, np.ndarray], np.ndarray]


def check_held(config: Any, foreign: Foreign) -> None:
    """Check that the table holds all of a model.

    Raises:
        ValueError: it does not.
    """
    found = [f"{path} ({kind})" for path, kind in foreign.changed.items()] + list(foreign.names)
    if found:
        raise ValueError(
            f"the model has {_some(found)}, which the parameter table of {config.architecture!r} cannot hold; "
            "where they are adapters, merge them first, as mamba_core.save(model, path, merge=True) does"
        )


def warn_of_hooks(foreign: Foreign) -> None:
    """Warn of what was hooked or patched, which parameters do not show."""
    if foreign.hooked:
        found = [f"{path or 'the model'} ({what})" for path, what in foreign.hooked.items()]
        warnings.warn(f"what is saved is the parameters alone, without what acts on {_some(found)}", stacklevel=3)


def merged(config: Any, foreign: Foreign, read: Callable[[str], np.ndarray], call: Call, dtype: str) -> Values:
    """The parameters with what was changed measured, each when it is asked for.

    Args:
        read: the value of a parameter by name, of layers that are not changed.
        call: (path, inputs) -> outputs of a layer, without dropout: (n,) int32 ids -> (n, d) of an embedding,
            (b, l, i) -> (b, l, o) of a linear layer or a norm, (b, l, e) -> (b, l, e) of a causal convolution that
            begins with zeros.
        dtype: the compute dtype.

    Raises:
        ValueError: a name that the table does not have, outside the layers; when it is asked for, also a layer that
            computes what no weights of the table compute.
    """
    layers = _layers(config)
    others = {**foreign.changed, **foreign.hooked}
    lost = [*foreign.names, *(f"{path or 'itself'} ({kind})" for path, kind in others.items() if path not in layers)]
    if lost:
        raise ValueError(
            f"the model has {_some(lost)}, which cannot be merged into the parameters of {config.architecture!r}"
        )
    measured: dict[str, dict[str, np.ndarray]] = {}
    changed = {*foreign.changed, *foreign.hooked} & set(layers)

    def value(name: str) -> np.ndarray:
        path, _, leaf = name.rpartition(".")
        if path not in changed:
            return read(name)
        if path not in measured:
            measured.clear()  # one layer at a time; its weight and bias come one after the other
            measured[path] = _measured(config, path, layers[path], call, dtype)
        stored = layers[path][leaf].dtype(dtype)
        return measured[path][leaf].astype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)

    return Values(config, value)


def _layers(config) -> dict[str, dict[str, Parameter]]:
    """Path -> {leaf: parameter} of the layers that a call goes through with one input."""
    layers: dict[str, dict[str, Parameter]] = {}
    for name, parameter in parameter_table(config).items():
        path, _, leaf = name.rpartition(".")
        layers.setdefault(path, {})[leaf] = parameter
    of_several = {node.parameters.get("weight") for node in block_graph(config) if len(node.inputs) > 1}
    return {
        path: leaves for path, leaves in layers.items() if "weight" in leaves and f"{path}.weight" not in of_several
    }


def _measured(config, path: str, leaves: Mapping[str, Parameter], call: Call, dtype: str) -> dict[str, np.ndarray]:
    """Leaf -> its value in float32, of a layer that was changed."""
    weight = leaves["weight"]
    rng, inputs = np.random.default_rng(0), weight.shape[0 if len(weight.shape) != 2 else 1]
    tolerance, refusal = TOLERANCE.get(dtype, HALF_TOLERANCE), f"{path} does not compute what a weight {weight.shape}"
    if weight.name == EMBEDDING:
        rows = _called(call, path, np.arange(weight.shape[0], dtype=np.int32))
        ids = rng.integers(0, weight.shape[0], (2, 5)).astype(np.int32)
        found = _called(call, path, ids)
        are_rows = rows.shape == weight.shape and found.shape == (*ids.shape, weight.shape[1])
        if not are_rows or not relative_l2(found, rows[ids]) <= tolerance:
            raise ValueError(f"{refusal} looks up; it cannot be merged")
        return {"weight": rows}
    bias = _called(call, path, np.zeros((1, 1, inputs), np.float32))[0, 0]
    if len(weight.shape) == 2:
        rows = _called(call, path, SCALE * np.eye(inputs, dtype=np.float32)[None])[0]
        found = (rows - bias).T / SCALE
        predict = lambda x: x @ found.T + bias  # noqa: E731
    elif len(weight.shape) == 3:
        taps = weight.shape[2]
        impulse = np.zeros((1, taps, inputs), np.float32)
        impulse[:, 0] = SCALE
        found = ((_called(call, path, impulse)[0] - bias) / SCALE)[::-1].T[:, None]
        predict = lambda x: _convolved(x, found[:, 0]) + bias  # noqa: E731
    else:
        ones = np.ones((1, 1, inputs), np.float32)
        found = _called(call, path, ones)[0, 0] * np.float32(np.sqrt(1 + config.norm_eps))
        predict = lambda x: found * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)  # noqa: E731
    values = {"weight": found.astype(np.float32), "bias": bias}
    if found.shape != weight.shape:
        raise ValueError(f"{refusal} computes; it cannot be merged")
    # Small ones too: a norm's epsilon shows in these.
    for scale in (1.0, 1e-3):
        x = scale * rng.standard_normal((2, 5, inputs)).astype(np.float32)
        y, expected = _called(call, path, x), predict(x)
        if y.shape != expected.shape or not relative_l2(y, expected) <= tolerance:
            raise ValueError(f"{refusal} computes; it cannot be merged")
    if "bias" not in leaves and len(weight.shape) != 1 and np.abs(bias).max(initial=0) > 0:
        raise ValueError(f"{path} adds a bias, which the parameters of {config.architecture!r} do not have")
    return {leaf: values[leaf] for leaf in leaves}


def _called(call: Call, path: str, inputs: np.ndarray) -> np.ndarray:
    return np.asarray(call(path, inputs)).astype(np.float32)


def _convolved(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """x (b, l, e), taps (e, k), the last for the position itself."""
    padded = np.pad(x, ((0, 0), (taps.shape[1] - 1, 0), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps.shape[1], axis=1)
    return np.einsum("blek,ek->ble", windows, taps)


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
