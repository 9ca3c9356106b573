"""The NumPy model: interprets the block graph in float64, forwards and backwards. The oracle of every backend."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from mamba_core import tasks
from mamba_core.backend import Observe, State
from mamba_core.spec import ops
from mamba_core.spec import state as states
from mamba_core.spec.graph import Node, block_graph
from mamba_core.spec.ops.base import Positions, counting
from mamba_core.spec.params import parameter_table
from mamba_core.tasks.base import EMBEDDED


class ReferenceModel:
    """A model of NumPy float64 arrays. Call it as the models of the backends are called.

    Args:
        config: of any architecture that has a graph.
        parameters: canonical name -> array.
    """

    def __init__(self, config: Any, parameters: Mapping[str, np.ndarray]):
        table = parameter_table(config)
        if set(parameters) != set(table):
            raise ValueError(f"parameters differ from the config's: {sorted(set(parameters) ^ set(table))}")
        self.config = config
        self.task = tasks.of(config)
        self.graph = block_graph(config)
        self.parameters = {name: np.asarray(parameters[name]).astype(np.float64) for name in table}

    def init_state(self, batch: int, room: int = 0) -> State:
        """The state before the first position: zeros. room: positions that a growing state has memory for."""

        def zeros(shape, dtype):
            return np.zeros(shape, np.float64 if dtype in ("compute", "float32") else dtype)

        return states.initial(self.config, batch, zeros, room)

    def __call__(
        self,
        inputs=None,
        state=None,
        *,
        inputs_embeds=None,
        mask=None,
        segment_ids=None,
        observe: Observe | None = None,
        **extras,
    ):
        """extras: those of the task."""
        positions = Positions(mask, segment_ids)
        _, values, after = self._run(*self.task.given(inputs, inputs_embeds), state, positions, extras)
        nodes = {node.name: values[node.name] for node in self.graph}
        if observe is not None:
            for name, value in nodes.items():
                observe(name, value)
        return self.task.result(nodes, after)

    def vjp(
        self,
        doutput,
        inputs=None,
        state=None,
        *,
        inputs_embeds=None,
        mask=None,
        segment_ids=None,
        dstate: State | None = None,
        dnodes: Mapping[str, np.ndarray] = MappingProxyType({}),
        **extras,
    ):
        """Gradients of sum(doutput * output), plus that of the final state if given, and of nodes by name.

        Returns:
            (canonical name -> gradient, gradients of the layers of the given state). The first holds also those
            of what is given, such as "inputs_embeds". The second has zeros for a count, which has no gradient.
        """
        positions = Positions(mask, segment_ids)
        inputs, kind = self.task.given(inputs, inputs_embeds)
        computed, values, _ = self._run(inputs, kind, state, positions, extras)
        before, same = self._entering(inputs, state, positions)
        dvalues = {name: np.asarray(value, np.float64) for name, value in dnodes.items()}
        dvalues[self.graph[-1].name] = np.asarray(doutput, np.float64) + dvalues.get(self.graph[-1].name, 0.0)
        dparameters = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        dlayers = [{name: np.zeros(np.shape(value)) for name, value in _named(layer)} for layer in before]
        for node in reversed(computed):
            arguments, named = self._arguments(node, values)
            carried = _carried(node, before)
            dcarried = (None,) * len(carried) if dstate is None else _carried(node, dstate.layers)
            dy = dvalues.pop(node.name, np.zeros_like(values[node.name]))
            dinputs, dnamed, dentering = ops.nodes()[node.op].vjp(
                dy, dcarried, arguments, named, node.settings, carried, positions
            )
            for name, gradient in zip(node.inputs, dinputs, strict=True):
                if gradient is not None:
                    dvalues[name] = dvalues.get(name, 0.0) + gradient
            for key, gradient in dnamed.items():
                dparameters[node.parameters[key]] += gradient
            if node.state:
                layer, fields = node.state
                for name, gradient in zip(fields, dentering, strict=True):
                    if gradient is not None:
                        dlayers[layer][name] = np.where(_rows(same, gradient), gradient, 0.0)
        # What is left is the gradient of what was given, if that has one.
        dvalues = {kind if name == EMBEDDED else name: value for name, value in dvalues.items()}
        return dparameters | dvalues, tuple(type(own)(**layer) for own, layer in zip(before, dlayers, strict=True))

    def _run(self, inputs, kind: str, state, positions: Positions, extras: Mapping[str, Any]):
        """The nodes that are computed, the values of all by name, and the state after the last position."""
        self.task.check(self.config, np.asarray(inputs), *positions, kind, extras)
        values = self.task.beginnings(self.config, inputs, kind, positions.mask, extras)
        # Not the embedding where embeddings are given in its place, for one.
        computed = [node for node in self.graph if node.name not in values]
        before, _ = self._entering(inputs, state, positions)
        layers = [dict(_named(layer)) for layer in before]
        for node in computed:
            arguments, named = self._arguments(node, values)
            carried = _carried(node, before)
            values[node.name], after = ops.nodes()[node.op].forward(arguments, named, node.settings, carried, positions)
            if node.state:
                layer, fields = node.state
                layers[layer] |= zip(fields, after, strict=True)
        after = tuple(type(own)(**layer) for own, layer in zip(before, layers, strict=True))
        return computed, values, State(after, self._last_segment(inputs, state, positions))

    def _arguments(self, node: Node, values):
        """The node's inputs, and its parameters by argument."""
        named = {key: self.parameters[name] for key, name in node.parameters.items()}
        return [values[name] for name in node.inputs], named

    def _entering(self, inputs, state, positions: Positions):
        """The layers' states that the first position sees, zero for rows that begin another segment; which are not."""
        batch = len(inputs)
        same = np.ones(batch, bool)
        if state is None:
            return self.init_state(batch, np.shape(inputs)[1]).layers, same
        state = states.with_room(self.config, state, np.shape(inputs)[1], np.asarray, _padded)
        if positions.segment_ids is not None:
            for row, (counts, segments) in enumerate(_rows_of(inputs, positions)):
                if counts.any():
                    same[row] = segments[counts][0] == state.segment[row]
        return tuple(type(own)(*(_kept(same, value) for value in own)) for own in state.layers), same

    def _last_segment(self, inputs, state, positions: Positions):
        last = np.zeros(len(inputs), np.int32) if state is None else np.array(state.segment)
        if positions.segment_ids is not None:
            for row, (counts, segments) in enumerate(_rows_of(inputs, positions)):
                last[row] = segments[counts][-1] if counts.any() else last[row]
        return last


def _named(layer):
    return zip(layer._fields, layer, strict=True)


def _carried(node: Node, layers) -> tuple:
    if node.state is None:
        return ()
    layer, fields = node.state
    return tuple(getattr(layers[layer], field) for field in fields)


def _rows(same: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(b,) as a shape that is broadcast over a value (b, ...)."""
    return same.reshape(-1, *(1,) * (np.ndim(value) - 1))


def _kept(same: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.where(_rows(same, value), value, np.zeros_like(value))


def _padded(value: np.ndarray, axis: int, count: int) -> np.ndarray:
    return np.pad(value, [(0, count if index == axis else 0) for index in range(value.ndim)])


def _rows_of(inputs, positions: Positions):
    """(which positions count, their segments) of each row."""
    return zip(counting(np.shape(inputs), positions.mask), np.asarray(positions.segment_ids), strict=True)
