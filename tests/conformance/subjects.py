"""What the laws are about: the two ops, a residual block and a whole model, each called in one way."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.backend import LayerState, State
from mamba_core.spec import recurrence
from mamba_core.spec.reference import ReferenceModel

from .strategies import Case, configs, conv_cases, positions, scan_cases, strides, tokens


class Piece(NamedTuple):
    """One call of a route: some rows and positions of the whole.

    start: the state that it begins from, "given" with the case, "carried" from the piece before, or "zero".
    passed: which of mask and segment_ids it is told.
    last: whether its final state is that of its rows.
    step: by the step of a single position.
    """

    rows: slice = slice(None)
    where: slice = slice(None)
    start: str = "given"
    passed: tuple[str, ...] = ("mask", "segment_ids")
    last: bool = True
    step: bool = False


class Subject(NamedTuple):
    """per_position: the arguments with an axis of positions. carries_segments: so does its state the segment id.

    cases(lengths) -> strategy of Case
    dtypes(case, dtype) -> (those of the arrays by name, those of the outputs)
    given(backend, case, arrays, rows) -> the state of the case, or None
    call(backend, case, arrays, piece, state, positions) -> outputs: y and the leaves of the final state; the state
    reference(backend, case, arrays, dtype) -> outputs in float64; a function of their gradients that gives those of
        the arrays by name
    """

    per_position: tuple[str, ...]
    carries_segments: bool
    cases: Callable
    dtypes: Callable
    given: Callable
    call: Callable
    reference: Callable


# --- the ops ---------------------------------------------------------------------------------------

PER_POSITION = ("x", "delta", "B", "C", "z")
KEPT_IN_FLOAT32 = ("A", "D", "delta_bias", "initial_state")


def _op_dtypes(op, case, dtype):
    kept = KEPT_IN_FLOAT32 if op == "selective_scan" else ()
    return {name: "float32" if name in kept else dtype for name in case.arrays}, [dtype, "float32" if kept else dtype]


def _op_given(backend, case, arrays, rows):
    state = arrays.get("initial_state")
    return None if state is None else state[rows]


def _op_call(op, backend, case, arrays, piece, state, positions):
    named = {name: value for name, value in arrays.items() if name != "initial_state"}
    where = piece.where.start if piece.step else piece.where
    named |= {name: named[name][piece.rows, where] for name in PER_POSITION if name in named}
    if not piece.step:
        named |= {"initial_state": state, "return_final_state": True}
        y, h = getattr(backend, op)(**named, **case.options, **positions)
        return (y, h), h
    if state is None:
        state = backend.from_numpy(np.zeros(_state_shape(case.arrays), np.float32))
    y, h = getattr(backend, STEPS[op])(**named, **case.options, state=state)
    return (y[:, None], h), h


def least_norm(case, arrays, what: str, reference) -> float:
    """The norm that y or an array's gradient would have if its terms did not happen to cancel.

    A sum of terms of random signs is of the size of their absolute sum over the square root of their number. Among
    100,000 examples were a gradient of 464 terms of unit scale that cancelled to 0.35 and kept an error of 1.1e-5, and
    sums over 64 states, after steps of 20, that kept a fiftieth of their terms.
    """
    if what in ("A", "D", "delta_bias", "weight", "bias"):
        return np.sqrt(reference.size * case.shape[0] * case.shape[1])
    if what != "y" or "A" not in arrays:
        return 0.0
    signed = ("A", "delta", "delta_bias")
    absolute = {name: value if name in signed else np.abs(value) for name, value in arrays.items()}
    y = recurrence.selective_scan(**absolute, **case.positions, **_mathematical(case.options))
    return np.linalg.norm(y) / np.sqrt(arrays["A"].shape[1])


STEPS = {"selective_scan": "selective_step", "causal_conv": "causal_conv_step"}


def _state_shape(arrays) -> tuple[int, ...]:
    batch, _, channels = arrays["x"].shape
    return (batch, *arrays["A"].shape) if "A" in arrays else (batch, arrays["weight"].shape[1] - 1, channels)


def _op_reference(op, backend, case, arrays, dtype):
    given = arrays | case.positions | _mathematical(case.options)
    vjp = getattr(recurrence, f"{op}_vjp")
    return getattr(recurrence, op)(**given, return_final_state=True), lambda cotangents: vjp(*cotangents, **given)


def _mathematical(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "kernel"}


def _op(name, cases) -> Subject:
    bound = (functools.partial(function, name) for function in (_op_dtypes, _op_call, _op_reference))
    dtypes, call, reference = bound
    return Subject(PER_POSITION, False, cases, dtypes, _op_given, call, reference)


# --- models ----------------------------------------------------------------------------------------


@st.composite
def model_cases(draw, lengths, tasks, **fixed) -> Case:
    """A model of any config and its inputs; with or without a state given, whose rows are of segments of their own."""
    config = draw(configs(task=draw(st.sampled_from(tasks)), **fixed))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(lengths)
    options, arrays = {"config": config, "input_ids": tokens(config, b, l)}, {}
    if config.task == "layers":
        arrays["inputs_embeds"] = rng.normal(size=(b, l, config.d_model))
    if draw(st.booleans()):
        options["segment"] = rng.integers(0, 2, b).astype(np.int32)
        for layer in range(config.n_layer):
            arrays[f"layers.{layer}.conv"] = rng.normal(size=(b, config.d_conv - 1, config.d_inner))
            arrays[f"layers.{layer}.ssm"] = rng.normal(size=(b, config.d_inner, config.d_state))
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return Case(arrays, draw(positions(b, l)), options, draw(strides(arrays)))


def _model_dtypes(case, dtype):
    config = case.options["config"]
    outputs = ["float32" if config.task == "lm" else dtype, *(dtype, "float32") * config.n_layer]
    return {name: "float32" if name.endswith("ssm") else dtype for name in case.arrays}, outputs


def _model_given(backend, case, arrays, rows):
    if "segment" not in case.options:
        return None
    layers = [
        LayerState(*(arrays[f"layers.{layer}.{field}"][rows] for field in LayerState._fields))
        for layer in range(case.options["config"].n_layer)
    ]
    segment = case.options["segment"][rows]
    return State(tuple(layers), segment if backend is None else backend.from_numpy(segment))


def _model_call(backend, case, arrays, piece, state, positions):
    model = built(backend, case.options["config"], case.dtype)
    given = arrays.get("inputs_embeds", case.options["input_ids"])[piece.rows, piece.where]
    given = given if "inputs_embeds" in arrays else backend.from_numpy(given, device=model.device)
    y, state = model(given, state, **positions)
    return (y, *_leaves(state.layers)), state


def _model_reference(backend, case, arrays, dtype):
    config = case.options["config"]
    model = reference_of(backend, config, dtype)
    given = (arrays.get("inputs_embeds", case.options["input_ids"]), _model_given(None, case, arrays, slice(None)))
    y, after = model(*given, **case.positions)

    def vjp(cotangents):
        layers = zip(cotangents[1::2], cotangents[2::2], strict=True)
        dstate = State(tuple(LayerState(*layer) for layer in layers), after.segment)
        gradients, before = model.vjp(cotangents[0], *given, **case.positions, dstate=dstate)
        for layer, entry in enumerate(before):
            gradients |= {f"layers.{layer}.{field}": value for field, value in entry._asdict().items()}
        return gradients

    return (y, *_leaves(after.layers)), vjp


def _leaves(layers):
    return [value for layer in layers for value in layer]


@functools.lru_cache(maxsize=32)
def built(backend, config, dtype):
    return mc.build(config, backend=backend.name, dtype=dtype, seed=1)


@functools.lru_cache(maxsize=32)
def reference_of(backend, config, dtype):
    """Of the values as that backend rounded them."""
    return ReferenceModel(config, dict(backend.parameters(built(backend, config, dtype))))


def _model(*tasks, **fixed) -> Subject:
    cases = functools.partial(model_cases, tasks=tasks, **fixed)
    per_position = ("inputs_embeds",) if "layers" in tasks else ()
    return Subject(per_position, True, cases, _model_dtypes, _model_given, _model_call, _model_reference)


SUBJECTS = {
    "selective_scan": _op("selective_scan", scan_cases),
    "causal_conv": _op("causal_conv", conv_cases),
    "block": _model("layers", n_layer=1),
    "model": _model("lm", "features"),
}
