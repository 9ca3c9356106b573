"""What the laws are about: every op, and a block and a whole model of every architecture, called in one way."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from mamba_core import architectures, tasks
from mamba_core.backend import State
from mamba_core.spec import ops
from mamba_core.spec import state as states

from .cases import cases
from .models import built, inputs, reference_of
from .strategies import Case, chooser, lengths, op_cases, positions, strides

# Longest sequences of a block and of a model; kernels' chunks are the ops' laws' business.
BLOCK, SHORT = lengths(65), st.sampled_from((0, 1, 2, 3, 15, 16, 17, 33))


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
    """traits: which laws hold. per_position: the arguments with an axis of positions.

    carries_segments: its state knows the segment that it belongs to.
    lengths: a strategy. cases(lengths) -> strategy of Case
    dtypes(case, dtype) -> (those of the arrays by name, those of the outputs)
    given(backend, case, arrays, rows) -> the state of the case, or None
    cut(case, arrays, piece) -> what a call of that piece is given, by name; arrays may be NumPy's
    call(backend, case, step, given, state, positions) -> outputs: y and the leaves of the final state; the state.
        It says nothing else about the piece than its arguments, so that pieces of one shape are compiled once.
    reference(backend, case, arrays, dtype) -> outputs in float64; a function of their gradients that gives those of
        the arrays by name
    least_norm(case, arrays, what, reference) -> the norm that y or an array's gradient would have if its terms did not
        happen to cancel
    """

    traits: architectures.Traits
    per_position: tuple[str, ...]
    carries_segments: bool
    lengths: st.SearchStrategy
    cases: Callable
    dtypes: Callable
    given: Callable
    cut: Callable
    call: Callable
    reference: Callable
    least_norm: Callable


# --- the ops ---------------------------------------------------------------------------------------


def _op_dtypes(op, case, dtype):
    def stored(name):
        return "float32" if name in op.float32 else dtype

    return {name: stored(name) for name in case.arrays}, [dtype, stored("final_state")]


def _op_given(op, backend, case, arrays, rows):
    state = arrays.get("initial_state")
    return None if state is None else state[rows]


def _op_cut(op, case, arrays, piece):
    named = {name: value for name, value in arrays.items() if name != "initial_state"}
    where = piece.where.start if piece.step else piece.where
    return named | {name: named[name][piece.rows, where] for name in op.per_position if name in named}


def _op_call(op, backend, case, step, named, state, positions):
    functions = backend.op(op.name)
    if not step:
        named = named | {"initial_state": state, "return_final_state": True}
        y, h = getattr(functions, op.name)(**named, **case.options, **positions)
        return (y, h), h
    if state is None:
        state = backend.from_numpy(np.zeros(op.state_shape(case.arrays), np.float32))
    y, h = getattr(functions, op.step.__name__)(**named, **case.options, state=state)
    return (y[:, None], h), h


def _op_reference(op, backend, case, arrays, dtype):
    given = arrays | case.positions | _mathematical(case.options)
    return op.forward(**given, return_final_state=True), lambda cotangents: op.vjp(*cotangents, **given)


def _op_least_norm(op, case, arrays, what: str, reference) -> float:
    """A sum of terms of random signs is of the size of their absolute sum over the square root of their number.

    Among 100,000 examples were a gradient of 464 terms of unit scale that cancelled to 0.35 and kept an error of
    1.1e-5, and sums over 64 states, after steps of 20, that kept a fiftieth of their terms.
    """
    if what in arrays and what not in (*op.per_position, "initial_state"):
        return np.sqrt(reference.size * case.shape[0] * case.shape[1])
    if what != "y" or op.magnitude is None:
        return 0.0
    return op.magnitude(arrays, case.positions, _mathematical(case.options))


def _mathematical(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "kernel"}


def _op(op: ops.Op) -> Subject:
    def of_op(function):
        return functools.partial(function, op)

    functions = map(of_op, (_op_dtypes, _op_given, _op_cut, _op_call, _op_reference, _op_least_norm))
    drawn = functools.partial(op_cases, op.name)
    return Subject(architectures.Traits(), op.per_position, False, lengths(), drawn, *functions)


# --- models ----------------------------------------------------------------------------------------


@st.composite
def model_cases(draw, lengths, file, tasks, **fixed) -> Case:
    """A model of any config and its inputs; with or without a state given, whose rows are of segments of their own."""
    config = file.draw(chooser(draw), task=draw(st.sampled_from(tasks)), **fixed)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(lengths)
    given, options, arrays = inputs(config, b, l), {"config": config}, {}
    if given.dtype.kind == "f":
        arrays["inputs_embeds"] = rng.normal(size=given.shape)
    else:
        options["input_ids"] = given
    # What grows has room from the start: inside a transformation of JAX a state is never grown.
    if architectures.traits(config).steps and (states.grows(config) or draw(st.booleans())):
        options["segment"] = rng.integers(0, 2, b).astype(np.int32)
        filled = rng.integers(0, 5, b).astype(np.int32)
        options["filled"] = filled
        for layer, field in states.table(config):
            name = f"layers.{layer}.{field.name}"
            if field.name == states.FILLED:
                continue
            value = rng.normal(size=field.stored_shape(b, states.capacity_for(int(filled.max(initial=0)) + l)))
            if field.grows is not None:  # what is not filled is zero
                at = np.arange(value.shape[field.grows]) < filled[:, None]
                value *= at.reshape(b, *(1,) * (field.grows - 1), -1, *(1,) * (value.ndim - field.grows - 1))
            arrays[name] = value
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return Case(arrays, draw(positions(b, l)), options, draw(strides(arrays)))


def _float_fields(config):
    """The fields that have gradients, by name."""
    return {f"layers.{i}.{field.name}": field for i, field in states.table(config) if field.dtype != "int32"}


def _model_dtypes(case, dtype):
    config = case.options["config"]
    fields = _float_fields(config)
    stored = {name: dtype if field.dtype == "compute" else field.dtype for name, field in fields.items()}
    outputs = ["float32" if tasks.of(config).float32 else dtype, *stored.values()]
    return {name: stored.get(name, dtype) for name in case.arrays}, outputs


def _model_given(backend, case, arrays, rows):
    if "segment" not in case.options:
        return None
    config = case.options["config"]

    def own(value):
        return value[rows] if backend is None else backend.from_numpy(value[rows])

    def layer(index):
        named = {
            field.name: own(case.options["filled"])
            if field.name == states.FILLED
            else arrays[f"layers.{index}.{field.name}"][rows]
            for field in states.fields(config, index)
        }
        return states.layer_types(config)[index](**named)

    return State(tuple(map(layer, range(config.n_layer))), own(case.options["segment"]))


def _model_cut(case, arrays, piece):
    return {"inputs": arrays.get("inputs_embeds", case.options.get("input_ids"))[piece.rows, piece.where]}


def _model_call(backend, case, step, given, state, positions):
    model = built(backend, case.options["config"], case.dtype)
    inputs = given["inputs"]
    inputs = backend.from_numpy(inputs, device=model.device) if isinstance(inputs, np.ndarray) else inputs
    if state is None and states.grows(model.config) and states.capacity_for(inputs.shape[1]) < _most(case):
        state = model.init_state(len(inputs), _most(case))  # of a part of the whole, whose state is compared
    y, state = model(inputs, state, **positions)
    return (y, *_outputs(case, state)), state


def _model_reference(backend, case, arrays, dtype):
    config = case.options["config"]
    model = reference_of(backend, config, dtype)
    given = (arrays.get("inputs_embeds", case.options.get("input_ids")), _model_given(None, case, arrays, slice(None)))
    y, after = model(*given, **case.positions)

    def vjp(cotangents):
        gradients, before = model.vjp(
            cotangents[0], *given, **case.positions, dstate=_cotangents(case, after, cotangents)
        )
        for layer, entry in enumerate(before):
            gradients |= {f"layers.{layer}.{field}": value for field, value in entry._asdict().items()}
        return gradients

    return (y, *_outputs(case, after)), vjp


def _outputs(case, state) -> list:
    """The state's arrays that have gradients; of what grows as many positions as may be filled, however it was run."""
    config, found, most = case.options["config"], [], _most(case)
    for layer, field in states.table(config):
        if field.dtype == "int32":
            continue
        value = getattr(state.layers[layer], field.name)
        found.append(value if field.grows is None else value[(slice(None),) * field.grows + (slice(most),)])
    return found


def _most(case) -> int:
    """Positions that may be filled after the whole case."""
    return int(case.options.get("filled", np.zeros(1, int)).max(initial=0)) + case.shape[1]


def _cotangents(case, after, cotangents) -> State:
    """The gradients of the final state, in its shapes."""
    config, rest = case.options["config"], iter(cotangents[1:])
    layers = []
    for index, layer in enumerate(after.layers):
        named = {}
        for field in states.fields(config, index):
            value = getattr(layer, field.name)
            named[field.name] = np.zeros(np.shape(value))
            if field.dtype != "int32":
                given = np.asarray(next(rest), np.float64)
                named[field.name][tuple(slice(size) for size in given.shape)] = given
        layers.append(type(layer)(**named))
    return State(tuple(layers), after.segment)


def _model(file, traits, longest, *tasks, **fixed) -> Subject:
    drawn = functools.partial(model_cases, file=file, tasks=tasks, **fixed)
    per_position = ("inputs_embeds",) if "layers" in tasks else ()
    functions = (drawn, _model_dtypes, _model_given, _model_cut, _model_call, _model_reference, lambda *_: 0.0)
    return Subject(traits, per_position, True, longest, *functions)


def _subjects():
    found = {name: _op(op) for name, op in ops.public().items()}
    for name, file in cases().items():
        traits = architectures.find(name).TRAITS
        found[f"{name} block"] = _model(file, traits, BLOCK, "layers", n_layer=1)
        if getattr(file, "MODEL", True):
            found[f"{name} model"] = _model(file, traits, SHORT, "lm", "features")
    return found


SUBJECTS = _subjects()
