"""What the files of ops have in common: the two kinds of op, checks of arguments, and float64 functions.

A file of this folder has `OP`, an op that every backend has in a file of the same name, or `NODES`, ops of the block
graph by name, or both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any


class Op(NamedTuple):
    """An op that backends compute: a function of arrays with the same signature everywhere.

    name: of the op and of its function in `backends/<backend>/ops/<name>.py`.
    forward: in NumPy float64, the signature of the contract without `kernel`; y, or (y, final state).
    vjp: (dy, dfinal_state, *arguments) -> the gradient of every array that was given, by name.
    step: one position, with the name that it has on every backend.
    per_position: the arguments with an axis of positions.
    float32: the arguments, and "final_state" where it is one, that stay float32 whatever the compute dtype.
    state_shape: the shape of the state, from the arguments by name.
    draw: (rng, choose, b, l) -> `Drawn`, how tests draw arguments.
    magnitude: (arrays, positions, options) -> the norm that y would have if its terms did not cancel; None where y has
        no long sums.
    samples: rng -> a few calls that between them have every option and odd sizes: with them a kernel is tried on the
        machine where it is to run (`mamba_core.selftest`). None for some that `draw` gives.
    """

    name: str
    forward: Callable
    vjp: Callable
    step: Callable
    per_position: tuple[str, ...]
    float32: tuple[str, ...]
    state_shape: Callable[[Mapping[str, np.ndarray]], tuple[int, ...]]
    draw: Callable[[np.random.Generator, Callable[[Sequence], Any], int, int], "Drawn"]
    magnitude: Callable | None = None
    samples: "Callable[[np.random.Generator], Iterable[Sample]] | None" = None


class Drawn(NamedTuple):
    """Arguments of an op: arrays are differentiated, options are not."""

    arrays: dict[str, np.ndarray]
    options: dict[str, Any]


class Sample(NamedTuple):
    """A call of an op: the compute dtype, its arguments, and those of mask and segment_ids that are given."""

    dtype: str
    drawn: Drawn
    positions: dict[str, np.ndarray]


# Of `samples_of` an op that lists none: dtype, length, and which of mask and segment_ids are given.
DRAWN = (
    ("float32", 257, ("mask", "segment_ids")),
    ("float32", 7, ()),
    ("float32", 1, ("mask",)),
    ("float32", 257, ("segment_ids",)),
    ("bfloat16", 257, ()),
    ("float16", 7, ("mask", "segment_ids")),
)


def samples_of(op: Op) -> list[Sample]:
    """The same calls every time."""
    rng = np.random.default_rng(0)
    if op.samples is not None:
        return list(op.samples(rng))
    found = []
    for index, (dtype, length, positions) in enumerate(DRAWN):
        # The first has what is chosen last, such as True, the second what is chosen first.
        of_all = [lambda values: values[-1], lambda values: values[0]]
        choose = of_all[index] if index < len(of_all) else lambda values: values[rng.integers(len(values))]
        found.append(Sample(dtype, op.draw(rng, choose, 2, length), draw_positions(rng, 2, length, positions)))
    return found


def draw_positions(rng, b: int, l: int, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of mask, with holes, and segment_ids that are named."""
    drawn = {"mask": rng.random((b, l)) < 0.7, "segment_ids": np.cumsum(rng.random((b, l)) < 0.15, 1).astype(np.int32)}
    return {name: drawn[name] for name in names}


class NodeOp(NamedTuple):
    """An op of the block graph in float64.

    forward: (inputs, parameters, settings, carried, positions) -> (value, carried after it).
    vjp: (dy, dcarried, inputs, parameters, settings, carried, positions) -> (gradients of the inputs, None for one that
        has none; gradients of the parameters by argument; gradients of what was carried).

    carried: the state's arrays in the order of the node's fields; () for a node without memory, in all three places.
    dcarried: their gradients, each of which may be None for zero.
    positions: a `Positions`.
    """

    forward: Callable
    vjp: Callable


class Positions(NamedTuple):
    """Which positions count, and to which sequence they belong; None where all do, or all to one."""

    mask: np.ndarray | None = None
    segment_ids: np.ndarray | None = None


def stateless(function: Callable, gradient: Callable) -> NodeOp:
    """A node op without memory and positions.

    function: (inputs, parameters, settings) -> value. gradient: (dy, inputs, parameters, settings) -> (gradients of the
    inputs, gradients of the parameters).
    """

    def forward(inputs, parameters, settings, carried, positions):
        return function(inputs, parameters, settings), ()

    def vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
        return *gradient(dy, inputs, parameters, settings), ()

    return NodeOp(forward, vjp)


def reversible(op: NodeOp) -> NodeOp:
    """The op with a setting "reverse": where it is true, the op goes from the last position to the first.

    The inputs, the mask and the segments are read backwards, so that a sequence begins at its last position.
    """

    def forward(inputs, parameters, settings, carried, positions):
        inputs, settings, positions, turned = _turned(inputs, settings, positions)
        value, after = op.forward(inputs, parameters, settings, carried, positions)
        return turned(value), after

    def vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
        inputs, settings, positions, turned = _turned(inputs, settings, positions)
        dinputs, dnamed, dentering = op.vjp(turned(dy), dcarried, inputs, parameters, settings, carried, positions)
        return [turned(gradient) for gradient in dinputs], dnamed, dentering

    return NodeOp(forward, vjp)


def _turned(inputs, settings, positions: Positions):
    """What an op is given, backwards where the settings say so; and the function that turns a value."""
    settings = dict(settings)
    if not settings.pop("reverse", False):
        return inputs, settings, positions, lambda value: value

    def turned(value):
        return None if value is None else np.asarray(value)[:, ::-1]

    return [turned(value) for value in inputs], settings, Positions(*map(turned, positions)), turned


# --- checks ------------------------------------------------------------------------------------------------
# They look at .shape and .dtype only, so any framework's arrays pass through.


def shape_of(name: str, value: Array, letters: Sequence[str]) -> tuple[int, ...]:
    """The shape of an array with so many axes.

    Raises:
        TypeError: it is no array.
        ValueError: it has another number of axes.
    """
    if value is None or not hasattr(value, "shape"):
        raise TypeError(f"{name} is {type(value).__name__}; expected an array ({', '.join(letters)})")
    if len(value.shape) != len(letters):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({', '.join(letters)})")
    return tuple(value.shape)


def expect_shape(name: str, value: Array | None, shape: tuple[int, ...], letters: str) -> None:
    """Raises TypeError or ValueError for an array that is given and has another shape."""
    if value is None:
        return
    if not hasattr(value, "shape"):
        raise TypeError(f"{name} is {type(value).__name__}; expected an array {letters} = {shape}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {letters} = {shape}")


def expect_floats(arrays: Mapping[str, Array | None]) -> None:
    """Raises TypeError for an array that is not of real floating-point numbers."""
    for name, value in arrays.items():
        if value is not None and "float" not in str(value.dtype):
            raise TypeError(f"{name} is {value.dtype}; expected real floating-point numbers")


def expect_rows(name: str, batch: int) -> None:
    """Raises ValueError for an empty batch."""
    if batch == 0:
        raise ValueError(f"{name} has batch 0; expected at least one row")


def check_positions(batch: int, length: int, mask: Array | None, segment_ids: Array | None) -> None:
    """Raises TypeError or ValueError for a mask or segment ids that do not fit (b, l)."""
    expect_shape("mask", mask, (batch, length), "(b, l)")
    expect_shape("segment_ids", segment_ids, (batch, length), "(b, l)")
    if mask is not None and "bool" not in str(mask.dtype):
        raise TypeError(f"mask is {mask.dtype}; expected bool, True where a position counts (try mask != 0)")
    if segment_ids is not None and "int" not in str(segment_ids.dtype):
        raise TypeError(f"segment_ids is {segment_ids.dtype}; expected integers")


# --- float64 -----------------------------------------------------------------------------------------------


def float64(value) -> np.ndarray:
    return np.asarray(value).astype(np.float64)


def softplus(value):
    """log(1 + exp(value)), exact at both ends."""
    return np.logaddexp(0.0, value)


def sigmoid(value):
    return np.exp(-softplus(-value))


def silu(value):
    return value * sigmoid(value)


def silu_derivative(value):
    return sigmoid(value) * (1.0 + value * sigmoid(-value))


def counting(shape: tuple[int, ...], mask) -> np.ndarray:
    """(b, l) bool: the positions that count, of an array (b, l, ...)."""
    return np.ones(shape[:2], dtype=bool) if mask is None else np.asarray(mask)


def restarts(valid: np.ndarray, segment_ids) -> np.ndarray:
    """(b, l) bool: this position counts and its segment is not that of the last position that counted."""
    restart = np.zeros(valid.shape, dtype=bool)
    if segment_ids is None:
        return restart
    for row, segments in enumerate(np.asarray(segment_ids)):
        current = None
        for t, segment in enumerate(segments):
            if valid[row, t]:
                restart[row, t] = current is not None and segment != current
                current = segment
    return restart


def summed(product: np.ndarray, rank: int) -> np.ndarray:
    """The sum over all axes but the last `rank` ones: the gradient of what was broadcast along them."""
    return product.sum(tuple(range(product.ndim - rank)))
