"""Parts of arrays."""

import numpy as np

from mamba_core.spec.ops.base import stateless


def _columns(inputs, parameters, settings):
    """Columns start to stop of the last axis."""
    return inputs[0][..., settings["start"] : settings["stop"]]


def _columns_vjp(dy, inputs, parameters, settings):
    gradient = np.zeros_like(inputs[0])
    gradient[..., settings["start"] : settings["stop"]] = dy
    return [gradient], {}


def _joined(inputs, parameters, settings):
    """One after another along the last axis."""
    return np.concatenate(inputs, axis=-1)


def _joined_vjp(dy, inputs, parameters, settings):
    return np.split(dy, np.cumsum([value.shape[-1] for value in inputs])[:-1], axis=-1), {}


NODES = {"columns": stateless(_columns, _columns_vjp), "joined": stateless(_joined, _joined_vjp)}
