"""A few rows by their experts in one native call, against the reference, on every vector width and for JAX."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backends.native import abi, library
from mamba_core.spec.ops import mixture_of_experts as spec
from tests.conformance.assertions import assert_close

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"no native library: {library.missing()}")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# rows, d, i, k, experts: less than a vector, more than a task, every expert, and more choices than experts.
SIZES = [(1, 5, 3, 1, 2), (3, 37, 50, 2, 8), (8, 130, 70, 3, 3), (2, 16, 260, 4, 5)]


def drawn(sizes, dtype):
    """x, chosen, probability, gate_up and down, and the reference's result."""
    rows, d, i, k, experts = sizes
    rng = np.random.default_rng(0)
    shapes = ((rows, d), (experts, 2 * i, d), (experts, d, i))
    x, gate_up, down = (rng.normal(size=shape).astype(DTYPES[dtype]) for shape in shapes)
    logits = rng.normal(size=(rows, experts)).astype(np.float32)
    chosen = spec.choice(logits, k).astype(np.int32)
    probability = np.take_along_axis(spec.softmax(logits), chosen, axis=-1)
    wanted = spec.mixture_of_experts(x[None], logits[None], gate_up, down, top_k=k)[0]
    return (x, chosen, probability, gate_up, down), wanted


def native(arrays, width=0, threads=1):
    x, chosen, _, gate_up, _ = arrays
    y = np.full(x.shape, np.nan, np.float32)
    sizes = (*x.shape, gate_up.shape[1] // 2, chosen.shape[1], len(gate_up))
    settings = (x.dtype != np.float32, threads, width, 0)
    library.experts_step(abi.ExpertsStep(*sizes, *settings, *(value.ctypes.data for value in (*arrays, y))))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [4, 8, 16])
def test_a_few_rows_are_the_reference(width, sizes, dtype):
    if width > library.width():
        pytest.skip(f"vectors here have {library.width()} lanes")
    arrays, wanted = drawn(sizes, dtype)
    one = native(arrays, width)
    assert_close(one, wanted, "float32", "value", "y")
    for threads in (2, 3):
        np.testing.assert_array_equal(native(arrays, width, threads), one)


def test_a_row_is_that_row_alone():
    arrays, _ = drawn(SIZES[1], "float32")
    together = native(arrays)
    for row in range(3):
        alone = [np.ascontiguousarray(value[row : row + 1]) for value in arrays[:3]]
        assert_close(native((*alone, *arrays[3:]))[0], together[row], "float32", "value", "y")


def test_an_expert_that_there_is_not_gives_no_number():
    """It is neither read nor passed over; the other rows are what they were."""
    arrays, _ = drawn(SIZES[1], "float32")
    wanted = native(arrays)
    for outside in (-1, 8):
        arrays[1][1, 0] = outside
        found = native(arrays)
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])


def test_a_workspace_beyond_memory_is_an_error():
    with pytest.raises(MemoryError, match="workspace"):
        library.experts_step(abi.ExpertsStep(2**20, 2**30, 1, 1, 1))


def test_the_struct_is_as_long_as_it_is_in_c():
    assert ctypes.sizeof(abi.ExpertsStep) == 5 * 8 + 4 * 4 + 6 * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_calls_it_for_a_few_positions(dtype):
    """With the plain form's gradient; more positions are computed otherwise."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    rng = np.random.default_rng(0)

    def compiled(rows):
        shapes = ((rows, 2, 33), (rows, 2, 4), (4, 20, 33), (4, 33, 10))
        arrays = [jax.numpy.asarray(rng.normal(size=shape), dtype) for shape in shapes]

        def loss(kernel, *arrays):
            y = mc.mixture_of_experts(*arrays, top_k=2, kernel=kernel)
            return (y.astype("float32") ** 2).sum(), y

        def run(kernel):
            # Where there will be a gradient, the plain form computes the value too.
            alone = jax.jit(loss, static_argnums=0)(kernel, *arrays)
            gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4), has_aux=True), static_argnums=0)
            return alone, gradient(kernel, *arrays)

        text = jax.jit(loss, static_argnums=0).lower("auto", *arrays).as_text()
        return "mamba_experts_step_xla" in text, run

    calls, run = compiled(3)
    assert calls
    found, wanted = run("native"), run("ragged")
    for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(value.astype("float32"), expected.astype("float32"), dtype, "gradient", "native")
    assert not compiled(5)[0]
