"""The mean of all inputs so far, those of earlier calls included; their history grows."""

import numpy as np

from mamba_core.spec.ops.base import NodeOp, counting


def _places(x, filled, positions):
    """(which positions count, how many inputs there are at each, (b, l) both)."""
    valid = counting(x.shape, positions.mask)
    return valid, np.asarray(filled)[:, None] + np.cumsum(valid, axis=1)


def _forward(inputs, parameters, settings, carried, positions):
    x, (history, filled) = inputs[0], carried
    valid, count = _places(x, filled, positions)
    history = np.array(history, np.float64)
    y = np.zeros_like(x)
    for row, t in zip(*np.nonzero(valid), strict=True):
        history[row, count[row, t] - 1] = x[row, t]
        y[row, t] = history[row, : count[row, t]].mean(0)
    return y, (history, (filled + valid.sum(1)).astype(np.int32))


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    x, (history, filled) = inputs[0], carried
    valid, count = _places(x, filled, positions)
    dhistory = np.zeros(history.shape) if dcarried[0] is None else np.array(dcarried[0], np.float64)
    for row, t in zip(*np.nonzero(valid), strict=True):
        dhistory[row, : count[row, t]] += dy[row, t] / count[row, t]
    dx = np.zeros_like(x)
    for row, t in zip(*np.nonzero(valid), strict=True):
        dx[row, t] = dhistory[row, count[row, t] - 1]
        dhistory[row, count[row, t] - 1] = 0.0
    return [dx], {}, (dhistory, None)


NODES = {"history_mean": NodeOp(_forward, _vjp)}
