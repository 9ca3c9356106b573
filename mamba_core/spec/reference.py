"""The NumPy model: interprets the block graph in float64, forwards and backwards. The oracle of every backend."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mamba_core.backend import Hidden, LayerState, Observe, Output, State
from mamba_core.spec import recurrence
from mamba_core.spec.checks import check_inputs
from mamba_core.spec.graph import Node, block_graph
from mamba_core.spec.params import parameter_table


class Positions(NamedTuple):
    """Which positions count, and to which sequence they belong; None where all do, or all to one."""

    mask: np.ndarray | None
    segment_ids: np.ndarray | None


class ReferenceModel:
    """A model of NumPy float64 arrays. Call it as the models of the backends are called.

    Args:
        config: of any architecture that has a graph.
        parameters: canonical name -> array.
    """

    def __init__(self, config, parameters: Mapping[str, np.ndarray]):
        table = parameter_table(config)
        if set(parameters) != set(table):
            raise ValueError(f"parameters differ from the config's: {sorted(set(parameters) ^ set(table))}")
        self.config = config
        self.graph = block_graph(config)
        self.parameters = {name: np.asarray(parameters[name]).astype(np.float64) for name in table}

    def init_state(self, batch: int) -> State:
        """The state before the first position: zeros."""
        c = self.config
        conv, ssm = np.zeros((batch, c.d_conv - 1, c.d_inner)), np.zeros((batch, c.d_inner, c.d_state))
        return State((LayerState(conv, ssm),) * c.n_layer, np.zeros(batch, np.int32))

    def __call__(self, inputs, state=None, *, mask=None, segment_ids=None, observe: Observe | None = None):
        values, after = self._run(inputs, state, mask, segment_ids)
        for node in self.graph if observe else ():
            observe(node.name, values[node.name])
        result = Output if self.config.task == "lm" else Hidden
        return result(values[self.graph[-1].name], after)

    def vjp(self, doutput, inputs, state=None, *, mask=None, segment_ids=None, dstate: State | None = None):
        """Gradients of sum(doutput * output), plus that of the final state if given; output is logits or hidden.

        Returns:
            (canonical name -> gradient, gradients of the layers of the given state). The first holds also that of
            "inputs_embeds" where these are given.
        """
        values, _ = self._run(inputs, state, mask, segment_ids)
        before, same = self._entering(inputs, state, mask, segment_ids)
        positions = Positions(mask, segment_ids)
        dvalues = {self.graph[-1].name: np.asarray(doutput, np.float64)}
        dparameters = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        dlayers = [{} for _ in before]
        for node in reversed(self.graph):
            arguments = [values[name] for name in node.inputs]
            named = {key: self.parameters[name] for key, name in node.parameters.items()}
            carried = _carried(node, before)
            dcarried = None if dstate is None or carried is None else _carried(node, dstate.layers)
            dy = dvalues.pop(node.name, np.zeros_like(values[node.name]))
            dinputs, dnamed, denter = OPS[node.op][1](dy, dcarried, arguments, named, node.settings, carried, positions)
            for name, gradient in zip(node.inputs, dinputs, strict=True):
                if gradient is not None:
                    dvalues[name] = dvalues.get(name, 0.0) + gradient
            for key, gradient in dnamed.items():
                dparameters[node.parameters[key]] += gradient
            if node.state:
                layer, key = node.state
                dlayers[layer][key] = denter * same[:, None, None]
        # What is left is the gradient of what was given, if that has one.
        return dparameters | dvalues, tuple(LayerState(**layer) for layer in dlayers)

    def _run(self, inputs, state, mask, segment_ids):
        values = self._given(inputs, mask, segment_ids)
        before, _ = self._entering(inputs, state, mask, segment_ids)
        positions = Positions(mask, segment_ids)
        layers = [layer._asdict() for layer in before]
        for node in self.graph:
            arguments = [values[name] for name in node.inputs]
            named = {key: self.parameters[name] for key, name in node.parameters.items()}
            forward = OPS[node.op][0]
            values[node.name], carried = forward(arguments, named, node.settings, _carried(node, before), positions)
            if node.state:
                layer, key = node.state
                layers[layer][key] = carried
        segment = self._last_segment(inputs, state, mask, segment_ids)
        return values, State(tuple(LayerState(**layer) for layer in layers), segment)

    def _given(self, inputs, mask, segment_ids) -> dict[str, np.ndarray]:
        """The value that the graph begins with, by name, checked."""
        inputs = np.asarray(inputs)
        check_inputs(self.config, inputs, mask, segment_ids)
        if self.config.task == "layers":
            return {"inputs_embeds": inputs.astype(np.float64)}
        if inputs.size and not (inputs.min() >= 0 and inputs.max() < self.config.padded_vocab_size):
            raise ValueError(f"input_ids holds ids outside 0..{self.config.padded_vocab_size - 1}")
        return {"input_ids": inputs}

    def _entering(self, inputs, state, mask, segment_ids):
        """The layers' states that the first position sees, zero for rows that begin another segment; which are not."""
        batch = len(inputs)
        if state is None:
            return self.init_state(batch).layers, np.ones(batch, bool)
        same = np.ones(batch, bool)
        if segment_ids is not None:
            for row, (counts, segments) in enumerate(zip(_counting(inputs, mask), segment_ids, strict=True)):
                if counts.any():
                    same[row] = segments[counts][0] == state.segment[row]
        keep = same[:, None, None]
        return tuple(LayerState(*(np.where(keep, value, 0.0) for value in layer)) for layer in state.layers), same

    def _last_segment(self, inputs, state, mask, segment_ids):
        last = np.array(self.init_state(len(inputs)).segment if state is None else state.segment)
        if segment_ids is not None:
            for row, (counts, segments) in enumerate(zip(_counting(inputs, mask), segment_ids, strict=True)):
                last[row] = segments[counts][-1] if counts.any() else last[row]
        return last


def cross_entropy(logits, targets, mask=None):
    """Mean of -log softmax(logits)[target] over the positions that count, and its gradient in the logits."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    counts = np.ones(targets.shape, bool) if mask is None else np.asarray(mask)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    gradient = np.exp(log_probabilities)
    np.put_along_axis(gradient, targets[..., None], np.take_along_axis(gradient, targets[..., None], -1) - 1.0, -1)
    return -chosen[counts].mean(), gradient * counts[..., None] / counts.sum()


# An op is a pair: forward(inputs, parameters, settings, carried, positions) -> value, carried, and its gradient
# vjp(dy, dcarried, inputs, parameters, settings, carried, positions) -> dinputs, dparameters, gradient of carried.


def _embedding(inputs, parameters, settings, carried, positions):
    return parameters["weight"][inputs[0]], None


def _embedding_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    gradient = np.zeros_like(parameters["weight"])
    np.add.at(gradient, inputs[0], dy)
    return [None], {"weight": gradient}, None


def _linear(inputs, parameters, settings, carried, positions):
    return inputs[0] @ parameters["weight"].T + parameters.get("bias", 0.0), None


def _linear_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    gradients = {"weight": np.einsum("blo,bli->oi", dy, inputs[0], optimize=True)}
    if "bias" in parameters:
        gradients["bias"] = dy.sum((0, 1))
    return [dy @ parameters["weight"]], gradients, None


def _masked(inputs, parameters, settings, carried, positions):
    return (inputs[0] if positions.mask is None else np.where(positions.mask[..., None], inputs[0], 0.0)), None


def _masked_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    return [dy if positions.mask is None else np.where(positions.mask[..., None], dy, 0.0)], {}, None


def _head(inputs, parameters, settings, carried, positions):
    return _masked([inputs[0] @ parameters["weight"].T], parameters, settings, carried, positions)


def _head_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    (dy,), _, _ = _masked_vjp(dy, dcarried, inputs, parameters, settings, carried, positions)
    return _linear_vjp(dy, dcarried, inputs, parameters, settings, carried, positions)


def _rms_norm(inputs, parameters, settings, carried, positions):
    x = inputs[0]
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + settings["eps"]) * parameters["weight"], None


def _rms_norm_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    x = inputs[0]
    scale = 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True) + settings["eps"])
    scaled = dy * parameters["weight"]
    dx = scale * (scaled - x * scale**2 * np.mean(scaled * x, -1, keepdims=True))
    return [dx], {"weight": (dy * x * scale).sum((0, 1))}, None


def _columns(inputs, parameters, settings, carried, positions):
    return inputs[0][..., settings["start"] : settings["stop"]], None


def _columns_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    gradient = np.zeros_like(inputs[0])
    gradient[..., settings["start"] : settings["stop"]] = dy
    return [gradient], {}, None


def _add(inputs, parameters, settings, carried, positions):
    return inputs[0] + inputs[1], None


def _add_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    return [dy, dy], {}, None


def _multiply(inputs, parameters, settings, carried, positions):
    return inputs[0] * inputs[1], None


def _multiply_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    return [dy * inputs[1], dy * inputs[0]], {}, None


def _causal_conv(inputs, parameters, settings, carried, positions):
    return recurrence.causal_conv(
        inputs[0],
        parameters["weight"][:, 0],
        parameters.get("bias"),
        initial_state=carried,
        return_final_state=True,
        **settings,
        **positions._asdict(),
    )


def _causal_conv_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    gradients = recurrence.causal_conv_vjp(
        dy,
        dcarried,
        inputs[0],
        parameters["weight"][:, 0],
        parameters.get("bias"),
        initial_state=carried,
        **settings,
        **positions._asdict(),
    )
    named = {"weight": gradients["weight"][:, None]} | {key: gradients[key] for key in parameters if key == "bias"}
    return [gradients["x"]], named, gradients["initial_state"]


# The gate z is one of them only where the scan applies it.
SCAN_INPUTS = ("x", "delta", "B", "C", "z")


def _scan_arguments(inputs, parameters, settings, carried, positions):
    named = dict(zip(SCAN_INPUTS, inputs, strict=False))
    named |= {"A": -np.exp(parameters["A_log"]), "D": parameters["D"]}
    bias = parameters["delta_bias"] * settings.get("delta_bias_factor", 1)
    fixed = {"delta_bias": bias, "delta_softplus": True, "initial_state": carried}
    return named | fixed | positions._asdict()


def _selective_scan(inputs, parameters, settings, carried, positions):
    arguments = _scan_arguments(inputs, parameters, settings, carried, positions)
    return recurrence.selective_scan(**arguments, return_final_state=True)


def _selective_scan_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    arguments = _scan_arguments(inputs, parameters, settings, carried, positions)
    gradients = recurrence.selective_scan_vjp(dy, dcarried, **arguments)
    named = {"A_log": gradients["A"] * arguments["A"], "D": gradients["D"]}
    named["delta_bias"] = gradients["delta_bias"] * settings.get("delta_bias_factor", 1)
    dinputs = [gradients[key] for key in SCAN_INPUTS[: len(inputs)]]
    return dinputs, named, gradients["initial_state"]


OPS = {
    "embedding": (_embedding, _embedding_vjp),
    "linear": (_linear, _linear_vjp),
    "masked": (_masked, _masked_vjp),
    "head": (_head, _head_vjp),
    "rms_norm": (_rms_norm, _rms_norm_vjp),
    "columns": (_columns, _columns_vjp),
    "add": (_add, _add_vjp),
    "multiply": (_multiply, _multiply_vjp),
    "causal_conv": (_causal_conv, _causal_conv_vjp),
    "selective_scan": (_selective_scan, _selective_scan_vjp),
}


def _carried(node: Node, layers):
    if node.state is None:
        return None
    layer, field = node.state
    return getattr(layers[layer], field)


def _counting(inputs, mask):
    return np.ones(np.shape(inputs)[:2], bool) if mask is None else np.asarray(mask)
