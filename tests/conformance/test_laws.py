"""Every way of computing the same thing is the float64 reference of the whole, in values and gradients.

A route is a list of calls that together make one: split where the state is carried, position by position, each row
alone, each packed sequence apart. Gradients run through the states that are carried, given and returned.
"""

import functools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import strategies as st

from mamba_core.weights.formats import DTYPES as DTYPE_OF

from .assertions import assert_close, assert_zero
from .compiling import compiled, vjp
from .strategies import Case, laid_out, law, lengths
from .subjects import SUBJECTS, Piece

# Of packed sequences on JAX: one position, no more than the convolution's window, and beyond it. Each is a program.
FEW = (1, 3, 8)
DTYPES = ("float32", "float32", "bfloat16", "float16")


@pytest.fixture(params=SUBJECTS, scope="session")
def name(request):
    return request.param


@law
def test_the_whole(backend, name, data):
    check(backend, name, draw_case(data, name), [Piece()], "whole")


@law
def test_split_with_the_carried_state(backend, name, data):
    """In up to four calls, of any lengths, none too."""
    needs(name, "steps")
    case = draw_case(data, name)
    if not SUBJECTS[name].carries_segments:  # the first position of an op's call goes on from the state it is given
        case.positions.pop("segment_ids", None)
    length = case.shape[1]
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3))), length]
    check(backend, name, case, _carried(bounds), f"split at {bounds[1:-1]}")


@law
def test_steps(backend, name, data):
    """A part as one call, the rest position by position."""
    needs(name, "steps")
    case = draw_case(data, name, st.integers(1, 17))
    case = case._replace(positions={})
    first = data.draw(st.integers(0, case.shape[1] - 1))
    check(backend, name, case, _carried([0, *range(first, case.shape[1] + 1)], step=True), f"steps from {first}")


@law
def test_each_row_alone(backend, name, data):
    """Without its padding, on either side, where the mask is no more than that."""
    case = draw_case(data, name)
    rows = [Piece(rows=slice(row, row + 1), **_unpadded(case, row)) for row in range(case.shape[0])]
    check(backend, name, case, rows, "each row alone")


@law
def test_packed_sequences_apart(backend, name, data):
    needs(name, "packs")
    case = draw_case(data, name, lengths(33))
    lengths_of = FEW if backend.name == "jax" else None
    case = case._replace(positions={"segment_ids": data.draw(_segments(*case.shape, lengths_of))})
    pieces = [piece for row in range(case.shape[0]) for piece in _sequences(name, case, row)]
    check(backend, name, case, pieces, "packed sequences apart")


@law
def test_causal(backend, name, data):
    """What comes later changes no value, bit for bit, and gets no gradient."""
    needs(name, "causal")
    case = draw_case(data, name, st.integers(1, 33))
    t = data.draw(st.integers(0, case.shape[1] - 1))
    later = np.arange(case.shape[1]) > t
    names = [key for key in SUBJECTS[name].per_position if key in case.arrays]
    kept = {key: (~later).reshape(-1, *(1,) * (case.arrays[key].ndim - 2)) for key in names}
    arrays = {key: np.where(kept[key], case.arrays[key], 3 * case.arrays[key] + 1) for key in names}
    options = dict(case.options)
    if "input_ids" in options:
        options["input_ids"] = np.where(later, (options["input_ids"] + 1) % 17, options["input_ids"])
    disturbed = case._replace(arrays=case.arrays | arrays, options=options)
    subject = SUBJECTS[name]
    given_arrays, seen = natives(backend, subject, case)
    outputs, _ = subject.reference(backend, case, seen, case.dtype)
    upto = [np.zeros(value.shape, dtype) for value, dtype in zip(outputs, _numpy_dtypes(subject, case), strict=True)]
    upto[0][:, : t + 1] = 1
    call = call_of(backend, subject, case)
    (y, *_), gradients = run(backend, subject, case, given_arrays, [Piece()], upto, call)
    others, _ = natives(backend, subject, disturbed)
    (changed, *_), _ = run(backend, subject, disturbed, others, [Piece()], upto, call)
    np.testing.assert_array_equal(changed[:, : t + 1], y[:, : t + 1])
    for key in names:
        assert_zero(gradients[key][:, later], f"{name}: gradient of y up to {t} in later {key}")


def needs(name, trait) -> None:
    """Skips a law that is none of the subject's."""
    if not getattr(SUBJECTS[name].traits, trait):
        pytest.skip(f"{name} has not the trait {trait!r}")


def draw_case(data, name, drawn_lengths=None) -> Case:
    subject = SUBJECTS[name]
    case = data.draw(subject.cases(subject.lengths if drawn_lengths is None else drawn_lengths))
    if not subject.traits.packs:
        case.positions.pop("segment_ids", None)
    return case._replace(dtype=data.draw(st.sampled_from(DTYPES)))


def check(backend, name, case, route, what):
    """The route's outputs and gradients are the reference's of the whole."""
    subject = SUBJECTS[name]
    arrays, seen = natives(backend, subject, case)
    expected, vjp = subject.reference(backend, case, seen, case.dtype)
    rng = np.random.default_rng(0)
    dtypes = subject.dtypes(case, case.dtype)[1]
    cotangents = [
        rng.normal(size=value.shape).astype(DTYPE_OF[dtype].numpy)
        for value, dtype in zip(expected, dtypes, strict=True)
    ]
    outputs, gradients = run(backend, subject, case, arrays, route, cotangents)

    def limit(stored):  # an op rounds its results once, a model at every projection
        return case.dtype if subject.carries_segments else stored

    told = {"dtype": case.dtype, "shape": case.shape}
    for index, (value, reference, stored) in enumerate(zip(outputs, expected, dtypes, strict=True)):
        output = f"state {index}" if index else "y"
        least = subject.least_norm(case, seen, output, reference)
        assert_close(value, reference, limit(stored), "value", f"{name}, {what}: {output}", least, **told)
    wanted = vjp(cotangents)
    for key, gradient in gradients.items():
        stored = gradient.dtype.name
        output, least = f"{name}, {what}: gradient of {key}", subject.least_norm(case, seen, key, wanted[key])
        assert_close(gradient, wanted[key], limit(stored), "gradient", output, least, **told)


def _numpy_dtypes(subject, case):
    return [DTYPE_OF[dtype].numpy for dtype in subject.dtypes(case, case.dtype)[1]]


def natives(backend, subject, case):
    """The case's arrays as the backend's, and as NumPy has what it made of them."""
    dtypes, _ = subject.dtypes(case, case.dtype)
    arrays = {key: laid_out(backend, value, case.strides[key], dtypes[key]) for key, value in case.arrays.items()}
    return arrays, {key: backend.to_numpy(array) for key, array in arrays.items()}


def call_of(backend, subject, case):
    """The subject's call in such cases."""
    return compiled(backend, functools.partial(subject.call, backend, case))


def run(backend, subject, case, arrays, route, cotangents, call=None):
    """(outputs, gradients by name) of a route; its pieces put together. Cotangents are of the whole outputs.

    call: as of `call_of`, for a case that differs in nothing but its arrays and ids.
    """
    call = call_of(backend, subject, case) if call is None else call
    positions = {key: backend.from_numpy(value) for key, value in case.positions.items()}
    places = [place for piece in route for place in _places(piece, len(cotangents))]

    def function(*values):
        named = dict(zip(arrays, values, strict=True))
        return tuple(_follow(backend, subject, case, named, positions, route, call))

    if arrays:
        cut = [np.ascontiguousarray(cotangents[index][at]) for index, at in places]
        cut = [backend.from_numpy(value, value.dtype.name) for value in cut]
        values, gradients = vjp(backend, function, list(arrays.values()), cut)
    else:  # a model of token ids that is given no state has nothing to differentiate
        values, gradients = [backend.to_numpy(value) for value in function()], []
    outputs = [np.zeros(value.shape) for value in cotangents]
    for (index, at), value in zip(places, values, strict=True):
        outputs[index][at] = value
    return outputs, dict(zip(arrays, gradients, strict=True))


def _follow(backend, subject, case, arrays, positions, route, call):
    """The outputs of the pieces, one after the other: y, and the final state where it is that of the rows."""
    outputs, carried = [], None
    for piece in route:
        starts = {"carried": carried, "zero": None}
        given_state = (
            subject.given(backend, case, arrays, piece.rows) if piece.start == "given" else starts[piece.start]
        )
        told = {key: positions[key][piece.rows, piece.where] for key in piece.passed if key in positions}
        (y, *leaves), carried = call(piece.step, subject.cut(case, arrays, piece), given_state, told)
        outputs += [y, *(leaves if piece.last else [])]
    return outputs


def _places(piece, count):
    """(which output, where in it) of a piece's outputs."""
    states = [(index, (piece.rows,)) for index in range(1, count)] if piece.last else []
    return [(0, (piece.rows, piece.where)), *states]


def _carried(bounds, step=False) -> list[Piece]:
    """Calls that end at the bounds, each going on from the state of the one before; the first is never a step."""
    pieces = [
        Piece(where=slice(start, stop), start="carried" if number else "given", last=False, step=step and number > 0)
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]
    return [*pieces[:-1], pieces[-1]._replace(last=True)]


def _unpadded(case, row) -> dict:
    """The row's positions without its padding, if padding is all that its mask says."""
    if "mask" not in case.positions:
        return {}
    counting = np.flatnonzero(case.positions["mask"][row])
    if len(counting) == 0 or counting[-1] - counting[0] >= len(counting):
        return {}
    return {"where": slice(int(counting[0]), int(counting[-1]) + 1), "passed": ("segment_ids",)}


@st.composite
def _segments(draw, b, l, few=None):
    """Ids that may come again later in a row, where they are another sequence. few: the lengths of all sequences."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if few is None:
        starts = rng.random((b, l)) < draw(st.sampled_from((0.1, 0.3, 1.0)))
    else:
        starts = np.zeros((b, l), bool)
        for row in starts:
            at = 0
            while at < l:
                row[at] = True
                at += rng.choice([length for length in few if length <= l - at])
    return (np.cumsum(starts, axis=1) % 3).astype(np.int32)


def _sequences(name, case, row) -> list[Piece]:
    """A call for each sequence of the row, without segment ids. The first may go on from what the case was given."""
    ids = case.positions["segment_ids"][row]
    bounds = [0, *(int(at) for at in np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    # An op goes on from any state; a model's state knows the segment that it belongs to.
    goes_on = (
        not SUBJECTS[name].carries_segments or len(ids) == 0 or ids[0] == case.options.get("segment", [0] * 3)[row]
    )
    starts = ["given" if goes_on else "zero"] + ["zero"] * (len(bounds) - 2)
    pieces = [
        Piece(slice(row, row + 1), slice(start, stop), begins, passed=(), last=False)
        for (start, stop), begins in zip(pairwise(bounds), starts, strict=True)
    ]
    return [*pieces[:-1], pieces[-1]._replace(last=True)]
