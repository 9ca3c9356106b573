"""One position of a block whose recurrence is the ssd in one native call: against the reference, at every width."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.backend import LayerState, State
from mamba_core.backends.native import abi, library
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from tests.conformance.assertions import assert_close
from tests.unit.native_arrays import widths

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
every_width = pytest.mark.parametrize("width", widths())
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
NO_LIMIT = (0.0, float("inf"))


def config_of(d_model, groups, heads, headdim, beside, **fields):
    """heads: of each group."""
    scanned = groups * heads * headdim
    # A half more than its channels, so that no rounding takes one.
    expand = (scanned + beside + 0.5) / d_model
    fixed = {"n_layer": 1, "vocab_size": 1, "task": "layers", "d_ssm": scanned, "expand": expand}
    return mc.Mamba2Config(d_model=d_model, ngroups=groups, headdim=headdim, **fixed, **fields)


booleans = st.booleans()
switches = dict.fromkeys(("bias", "conv_bias", "rmsnorm", "norm_before_gate", "D_has_hdim"), booleans)
configs = st.builds(
    config_of,
    d_model=st.integers(1, 40),
    groups=st.integers(1, 3),
    heads=st.integers(1, 3),
    headdim=st.sampled_from((1, 3, 8, 21)),
    beside=st.integers(0, 20),
    d_state=st.integers(1, 40),
    d_conv=st.integers(1, 4),
    dt_limit=st.sampled_from((NO_LIMIT, (0.01, 0.2), (0.3, 0.3))),
    # One number or two can both be almost zero. Their norm would then magnify what float32 rounds.
    norm_eps=st.sampled_from((0.01, 0.3)),
    **switches,
)
# 15 rows are every size of the groups that rows are computed in.
rows = st.integers(1, 8) | st.just(15)
dtypes = st.sampled_from(list(DTYPES))


class Case:
    """A block with drawn parameters, named as they end, and what one position of it is given."""

    def __init__(self, config, b, dtype, residual_dtype="float32", seed=0):
        self.config, self.b = config, b
        self.dtype, self.residual_dtype = DTYPES[dtype], DTYPES[residual_dtype]
        self.rng = np.random.default_rng(seed)
        shapes = (config.d_conv - 1, config.conv_dim), (config.nheads, config.headdim, config.d_state)
        self.parameters = {name: self.parameter(entry) for name, entry in parameter_table(config).items()}
        self.residual = self.draw((b, 1, config.d_model), self.residual_dtype)
        self.state = LayerState(self.draw((b, *shapes[0]), self.dtype), self.draw((b, *shapes[1]), np.float32))

    def draw(self, shape, dtype, scale=1.0):
        return (self.rng.normal(size=shape) * scale).astype(dtype)

    def parameter(self, entry):
        scale = 1.0 if len(entry.shape) == 1 else entry.shape[-1] ** -0.5
        return self.draw(entry.shape, np.float32 if entry.float32 else self.dtype, scale)

    def own(self, name):
        return self.parameters.get(f"backbone.layers.0.{name}")

    def reference(self):
        """(residual, state) in float64."""
        state = State((self.state,), np.zeros(self.b, np.int32))
        out = ReferenceModel(self.config, self.parameters)(self.residual.astype(np.float64), state)
        return out.hidden, out.state.layers[0]

    def native(self, width=0, threads=1, transposed=False, in_place=False):
        """(residual, state); in_place: in the memory of those before."""
        c, kept = self.config, []

        def at(array):
            if array is None:
                return None
            kept.append(np.ascontiguousarray(array))
            return kept[-1].ctypes.data

        def matrix(name):
            weight = self.own(f"mixer.{name}.weight")
            weight = weight.reshape(len(weight), -1)
            return abi.Matrix(at(weight.T if transposed else weight), at(self.own(f"mixer.{name}.bias")))

        given = self.residual, *self.state
        results = [value.copy() if in_place else np.empty_like(value) for value in given]
        given = results if in_place else given
        step = abi.SsdStep(
            *(self.b, c.d_model, c.nheads, c.headdim, c.d_state, c.ngroups, c.d_conv, c.d_gated),
            *(self.dtype != np.float32, self.residual_dtype != np.float32, transposed, threads, width),
            *(c.D_has_hdim, c.norm_before_gate, c.norm_eps, c.norm_eps, *c.dt_limit),
            *(at(value) for value in (*given, self.own("norm.weight"))),
            *(matrix(name) for name in ("in_proj", "conv1d", "out_proj")),
            *(at(self.own(f"mixer.{name}")) for name in ("dt_bias", "A_log", "D", "norm.weight")),
            *(result.ctypes.data for result in results),
        )
        library.ssd_steps((abi.SsdStep * 1)(step))
        return results[0], LayerState(*results[1:])

    def assert_native(self, **how):
        """That the step is the reference's. All is float32 inside, and only the results are rounded to bfloat16."""
        (residual, state), (wanted, wanted_state) = self.native(**how), self.reference()
        assert_close(residual, wanted, str(self.residual.dtype), "value", "residual", config=self.config, **how)
        assert_close(state.conv, wanted_state.conv, str(self.state.conv.dtype), "value", "conv state", **how)
        assert_close(state.ssm, wanted_state.ssm, "float32", "value", "ssm state", **how)


@every_width
@given(configs, rows, dtypes, dtypes, booleans, st.sampled_from((1, 2, 3)), st.integers(0, 99))
def test_a_step_is_the_reference(width, config, b, dtype, residual_dtype, transposed, threads, seed):
    case = Case(config, b, dtype, residual_dtype, seed)
    before = [value.copy() for value in (case.residual, *case.state)]
    case.assert_native(width=width, threads=threads, transposed=transposed)
    for value, kept in zip((case.residual, *case.state), before, strict=True):
        np.testing.assert_array_equal(value, kept)


# Sizes that no vector divides, and every switch once on and once off.
ODD = config_of(19, 2, 2, 13, 7, d_state=21, bias=True, norm_before_gate=True, dt_limit=(0.01, 0.5), norm_eps=0.1)
BARE = config_of(19, 3, 1, 17, 0, d_state=15, conv_bias=False, rmsnorm=False, D_has_hdim=True, d_conv=2)
# Enough for every thread that is asked for to be started.
LARGE = config_of(256, 2, 3, 70, 91, d_state=33)


@every_width
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [ODD, BARE], ids=["odd", "bare"])
def test_every_batch(width, transposed, dtype, config):
    for b in range(1, 9):
        Case(config, b, dtype, seed=b).assert_native(width=width, transposed=transposed, threads=b % 3 + 1)


@every_width
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(width, transposed, dtype):
    case = Case(LARGE, 2, dtype)
    case.assert_native(width=width, transposed=transposed)
    one, one_state = case.native(width, 1, transposed)
    for threads in (2, 3):
        for _ in range(20):
            other, other_state = case.native(width, threads, transposed)
            for value, wanted in zip((other, *other_state), (one, *one_state), strict=True):
                np.testing.assert_array_equal(value, wanted)


@every_width
@pytest.mark.parametrize("transposed", [False, True])
def test_results_in_place_of_what_they_replace(width, transposed):
    case = Case(LARGE, 3, "bfloat16")
    (there, states), (here, own_states) = (case.native(width, 2, transposed, in_place) for in_place in (False, True))
    for value, wanted in zip((here, *own_states), (there, *states), strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_is_that_row_alone(transposed):
    case = Case(LARGE, 15, "float32")
    together, states = case.native(transposed=transposed)
    for row in (0, 8, 12, 14):
        alone = Case(LARGE, 1, "float32")
        alone.parameters, alone.residual = case.parameters, case.residual[row : row + 1]
        alone.state = LayerState(*(value[row : row + 1] for value in case.state))
        residual, state = alone.native(transposed=transposed)
        np.testing.assert_array_equal(residual[0], together[row])
        np.testing.assert_array_equal(state.ssm[0], states.ssm[row])


@every_width
def test_a_step_of_zero_keeps_the_state_whatever_its_rate(width):
    """exp(A_log) is beyond a float, and zero times infinity would be no number."""
    case = Case(config_of(19, 1, 2, 13, 0, d_state=21, dt_limit=(0.0, 0.0)), 2, "float32")
    case.own("mixer.A_log")[:] = 200.0
    case.assert_native(width=width)
    np.testing.assert_array_equal(case.native(width)[1].ssm, case.state.ssm)


@every_width
def test_a_step_at_the_ends_of_the_floats(width):
    """A softplus of 200 and of -200: the state decays to nothing, and not at all."""
    case = Case(config_of(19, 1, 2, 13, 0, d_state=21), 2, "float32")
    case.own("mixer.dt_bias")[:] = 200.0, -200.0
    case.own("mixer.A_log")[:] = 3.0
    case.assert_native(width=width)
    np.testing.assert_array_equal(case.native(width)[1].ssm[:, 1], case.state.ssm[:, 1])


def test_a_step_that_is_no_number_stays_one():
    case = Case(ODD, 1, "float32")
    case.own("mixer.dt_bias")[0] = np.nan
    residual, state = case.native()
    assert np.isnan(state.ssm[0, 0]).all()
    assert np.isfinite(state.ssm[0, 1:]).all()
    assert np.isnan(residual).all()


def test_the_struct_is_as_long_as_it_is_in_c():
    """Eight sizes, seven settings and four floats filled up to eight bytes, and the pointers."""
    assert ctypes.sizeof(abi.SsdStep) == 8 * 8 + (7 + 4 + 1) * 4 + (4 + 3 * 2 + 4 + 3) * 8
    assert abi.SsdStep.residual.offset == 8 * 8 + 48


def test_no_step_and_one_beyond_memory():
    library.ssd_steps((abi.SsdStep * 0)())
    huge = (abi.SsdStep * 1)(abi.SsdStep(2**20, 2**30, 1, 1, 1, 1, 1))
    with pytest.raises(MemoryError, match="workspace"):
        library.ssd_steps(huge)
