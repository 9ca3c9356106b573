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


NODES = {"columns": stateless(_columns, _columns_vjp)}
