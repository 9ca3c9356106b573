"""The model of a backend against the float64 reference, and the laws that it obeys."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import architectures, tasks
from mamba_core.spec import ops
from mamba_core.spec import state as states
from mamba_core.spec.graph import block_graph
from mamba_core.spec.init import initial_values
from mamba_core.spec.ops.base import Positions
from mamba_core.spec.params import parameter_table

from .assertions import assert_close
from .cases import configs
from .models import assert_states, built, call, leaves, reference
from .strategies import tokens

BATCH, LENGTH = 3, 20
# Ops that compute in float32 from what they are given and round their result once.
ONE_ROUNDING = ("rms_norm", "unit_rms_norm", "add", *ops.public())
CONFIGS = configs()


@pytest.fixture(params=CONFIGS, scope="session")
def config(request):
    return CONFIGS[request.param]


def needs(config, trait) -> None:
    if not getattr(architectures.traits(config), trait):
        pytest.skip(f"{config.architecture} has not the trait {trait!r}")


def test_every_node_equals_the_reference(backend, config):
    ids = tokens(config, BATCH, LENGTH)
    expected, observed = {}, {}
    wanted = reference(config)(ids, observe=expected.__setitem__)
    model = built(backend, config)
    out = model(
        backend.from_numpy(ids, device=model.device),
        observe=lambda node, value: observed.__setitem__(node, backend.to_numpy(value)),
    )
    assert list(observed) == list(expected)
    for node, value in expected.items():
        kind = "value" if node == "logits" else "node"
        assert_close(observed[node], value, "float32", kind, node, config=config.architecture)
    assert_states(backend, config, out.state, wanted.state, "after the last position")
    assert backend.to_numpy(out.logits).dtype == np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_the_reference(backend, config, dtype):
    ids = tokens(config, BATCH, LENGTH)
    logits, state = call(backend, built(backend, config, dtype), ids)
    assert_close(logits, reference(config)(ids).logits, dtype, "value", "logits", config=config.architecture)
    assert logits.dtype == np.float32
    assert {key: value.dtype.name for key, value in leaves(config, state, backend.to_numpy).items()} == {
        f"layers.{layer}.{field.name}": dtype if field.dtype == "compute" else field.dtype
        for layer, field in states.table(config)
    }


def test_half_precision_rounds_once(backend, config):
    """Norms, convolution, scan and residual compute in float32 from what they are given and round the result once."""
    model = built(backend, config, "bfloat16")
    ids = tokens(config, BATCH, LENGTH)
    given, dtypes = {}, {}

    def observe(node, value):
        value = backend.to_numpy(value)
        given[node], dtypes[node] = value.astype(np.float64), value.dtype

    model(backend.from_numpy(ids, device=model.device), observe=observe)
    parameters = {key: value.astype(np.float64) for key, value in backend.parameters(model).items()}
    zeros = reference(config).init_state(BATCH, LENGTH).layers
    for node in block_graph(config):
        if node.op not in ONE_ROUNDING:
            continue
        inputs = [given[key] for key in node.inputs]
        named = {key: parameters[canonical] for key, canonical in node.parameters.items()}
        layer, fields = node.state or (0, ())
        carried = tuple(getattr(zeros[layer], field) for field in fields)
        wanted, _ = ops.nodes()[node.op].forward(inputs, named, node.settings, carried, Positions())
        kept = "float32" if node.op == "add" and config.residual_in_fp32 else "bfloat16"
        assert dtypes[node.name].name == kept, node.name
        different = given[node.name] != wanted.astype(dtypes[node.name]).astype(np.float64)
        # Float32's own rounding moves a few results across the middle between two values of the dtype.
        assert different.mean() <= 0.02, f"{node.name}: {different.mean():.1%} not the nearest {kept}"


def test_initial_state(backend, config):
    """Zeros, in the dtypes of the contract."""
    for dtype in ("float32", "bfloat16"):
        state = built(backend, config, dtype).init_state(2)
        assert len(state.layers) == config.n_layer
        for layer, field in states.table(config):
            value = backend.to_numpy(getattr(state.layers[layer], field.name))
            shape = field.stored_shape(2, states.capacity_for(0))
            wanted = dtype if field.dtype == "compute" else field.dtype
            assert (value.shape, value.dtype.name) == (shape, wanted), field
            assert not value.any()
        assert backend.to_numpy(state.segment).dtype == np.int32


def test_parameters_are_the_table(backend, config):
    table = parameter_table(config)
    for dtype in ("float32", "bfloat16"):
        found = dict(backend.parameters(built(backend, config, dtype)))
        assert list(found) == list(table)
        for key, value in found.items():
            assert value.shape == table[key].shape
            assert value.dtype.name == table[key].dtype(dtype), key


def test_initial_values_are_the_streams_bit_for_bit(backend, config):
    for (key, value), (wanted_key, wanted) in zip(
        backend.parameters(built(backend, config)).items(), initial_values(config, 1), strict=True
    ):
        assert key == wanted_key
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_reference(backend, config, masked):
    needs(config, "causal")  # or the loss of the next token is none
    ids = tokens(config, BATCH, LENGTH + 1)
    mask = None
    if masked:
        mask = np.arange(LENGTH + 1) < np.array([LENGTH + 1, 9, 4])[:, None]
    loss, gradients = backend.loss_and_gradients(built(backend, config), ids, mask)
    inside = None if mask is None else mask[:, :-1]
    logits = reference(config)(ids[:, :-1], mask=inside).logits
    targets = None if mask is None else mask[:, 1:]
    wanted, dlogits = tasks.of(config).loss(config, logits, ids[:, 1:], targets)
    expected, _ = reference(config).vjp(dlogits, ids[:, :-1], mask=inside)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert list(gradients) == list(expected)
    for key, value in expected.items():
        norm = np.linalg.norm(value)
        assert np.linalg.norm(gradients[key].astype(np.float64) - value) <= 1e-5 * max(norm, 1e-3), key


@pytest.mark.parametrize("seed", range(4))
def test_masks_and_segments_together_equal_the_reference(backend, config, seed):
    rng = np.random.default_rng(seed)
    ids = tokens(config, BATCH, LENGTH)
    positions = {"mask": rng.random(ids.shape) < 0.7, "segment_ids": np.cumsum(rng.random(ids.shape) < 0.2, 1)}
    positions["segment_ids"] = positions["segment_ids"].astype(np.int32)
    needs(config, "packs")
    # The first and the last position of a row do not count, and are of segments of their own.
    positions["mask"][0, -1] = positions["mask"][1, 0] = False
    positions["segment_ids"][0, -1] += 1
    positions["segment_ids"][1, 1:] += 1
    logits, state = call(backend, built(backend, config), ids, **positions)
    wanted = reference(config)(ids, **positions)
    assert_close(logits, wanted.logits, "float32", "value", "logits")
    assert_states(backend, config, state, wanted.state, "mask and segments")
    np.testing.assert_array_equal(backend.to_numpy(state.segment), wanted.state.segment)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_sequences(backend, config, length):
    ids = tokens(config, BATCH, length)
    logits, state = call(backend, built(backend, config), ids)
    wanted = reference(config)(ids)
    assert_close(logits, wanted.logits, "float32", "value", "logits")
    assert_states(backend, config, state, wanted.state, "short")


def test_the_given_state_is_not_changed(backend, config):
    needs(config, "steps")
    model = built(backend, config)
    _, state = call(backend, model, tokens(config, BATCH, 5))
    before = {key: value.copy() for key, value in states.named(state).items() for value in [backend.to_numpy(value)]}
    for length in (1, 4):
        call(backend, model, tokens(config, BATCH, length, seed=2), state)
    for key, value in states.named(state).items():
        np.testing.assert_array_equal(backend.to_numpy(value), before[key])


def test_bad_input_is_refused_or_gives_no_number(backend, config):
    model = built(backend, config)
    with pytest.raises(ValueError, match="batch 0"):
        call(backend, model, np.zeros((0, 4), np.int32))
    with pytest.raises(ValueError, match="expected"):
        call(backend, model, np.zeros(4, np.int32))
    with pytest.raises(TypeError, match="integers"):
        call(backend, model, np.zeros((1, 4), np.float32))
    ids = tokens(config, 1, 6)
    for outside in (-1, config.padded_vocab_size):
        ids[0, 3] = outside
        try:
            logits, _ = call(backend, model, ids)
        except (IndexError, ValueError):
            continue
        assert np.isnan(logits[0, 3:]).all(), outside


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_and_loaded_bit_for_bit(backend, config, dtype, tmp_path):
    mc.save(built(backend, config, dtype), tmp_path / "one")
    loaded = mc.load(tmp_path / "one", backend=backend.name)
    assert loaded.dtype == dtype
    assert loaded.config == config
    mc.save(loaded, tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    for file in names:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
