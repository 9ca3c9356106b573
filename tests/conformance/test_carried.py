"""What is known of a decode state from outside: its bytes and its room; and going back in it."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.registry import installed
from mamba_core.spec import state as states
from mamba_core.spec.init import initial_values

from .assertions import assert_close
from .cases import configs
from .models import built, call, leaves
from .strategies import tokens

MIXED = configs()["jamba base"]
# All of its layers keep what they have seen.
CONFIG = dataclasses.replace(MIXED, attn_layer_period=1, attn_layer_offset=0)
FORGETS = configs()["mamba base"]


def assert_same(backend, found, expected, what) -> None:
    """Bit for bit what is filled, and zero behind it."""
    for layer, own in enumerate(found.layers):
        np.testing.assert_array_equal(backend.to_numpy(own.filled), backend.to_numpy(expected.layers[layer].filled))
    positions = min(layer.keys.shape[1] for state in (found, expected) for layer in state.layers)
    given, wanted = (leaves(CONFIG, state, backend.to_numpy, positions) for state in (found, expected))
    for name, value in wanted.items():
        np.testing.assert_array_equal(given[name], value, err_msg=f"{what}: {name}")
    for name, value in leaves(CONFIG, found, backend.to_numpy, found.layers[0].keys.shape[1]).items():
        assert not name.endswith(("keys", "values")) or not value[:, positions:].any(), name


def test_rewinding_gives_the_state_that_was(backend):
    """A number for each row, after padding of each row; what follows is computed as it was."""
    model, ids, more = built(backend, CONFIG), tokens(CONFIG, 2, 9), tokens(CONFIG, 2, 6, seed=1)
    mask = np.arange(9) >= np.array([0, 4])[:, None]
    _, before = call(backend, model, ids, mask=mask)
    wanted, after = call(backend, model, more, before)
    back = mc.rewind(model, after, 6)
    assert_same(backend, back, before, "all six")
    found, _ = call(backend, model, more, back)
    np.testing.assert_array_equal(found, wanted)
    part = mc.rewind(model, after, [2, 5])
    assert mc.state_info(model, part).layers[0].filled == (9 + 4, 5 + 1)
    shown = np.arange(6) >= 6 - np.array([2, 5])[:, None]
    found, _ = call(backend, model, more, part, mask=shown)
    assert_close(found[shown], wanted[shown], "float32", "value", "after a rewind")


def test_rewinding_does_not_change_the_state_that_is_given(backend):
    model = built(backend, CONFIG)
    _, state = call(backend, model, tokens(CONFIG, 2, 9))
    kept = {name: np.array(backend.to_numpy(value)) for name, value in states.named(state).items()}
    mc.rewind(model, state, 4)
    for name, value in states.named(state).items():
        np.testing.assert_array_equal(backend.to_numpy(value), kept[name])


def test_rewinding_keeps_to_the_last_sequence(backend):
    model, ids = built(backend, CONFIG), tokens(CONFIG, 1, 9)
    _, state = call(backend, model, ids, segment_ids=np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1]], np.int32))
    assert mc.state_info(model, mc.rewind(model, state, 4)).layers[0].filled == (0,)
    with pytest.raises(ValueError, match="row 0 has 4 positions in layer 0, and 5 were to be taken back; expected 4"):
        mc.rewind(model, state, 5)


@pytest.mark.parametrize("n", [-1, True, 1.0, None, "1", [1], [1, -1], [1, 1.0], [[1], [2]]])
def test_what_is_no_number_of_positions_is_refused(backend, n):
    model = built(backend, CONFIG)
    with pytest.raises(ValueError, match=r"n is .*; expected an integer from 0, or one for each of 2 rows"):
        mc.rewind(model, model.init_state(2), n)


@pytest.mark.parametrize(("config", "name"), [(MIXED, "conv"), (FORGETS, "conv")])
def test_a_layer_that_forgets_is_named(backend, config, name):
    model = built(backend, config)
    with pytest.raises(ValueError, match=f"layer 0 carries {name}, which does not keep the positions that were"):
        mc.rewind(model, model.init_state(2), 0)


def test_room_is_what_the_filled_positions_leave(backend):
    model = built(backend, CONFIG)
    assert mc.room(model, model.init_state(2, 20)) == 32
    _, state = call(backend, model, tokens(CONFIG, 2, 9), model.init_state(2, 20))
    assert mc.room(model, state) == 23
    assert mc.room(model, mc.grown(model, state, 23)) == 23
    wide = mc.grown(model, state, 24)
    assert mc.room(model, wide) == 64 - 9
    more = tokens(CONFIG, 2, 3, seed=1)
    found, wanted = (call(backend, model, more, start)[0] for start in (wide, state))
    assert_close(found, wanted, "float32", "value", "with more room")
    forgetful = built(backend, FORGETS)
    assert mc.room(forgetful, forgetful.init_state(2)) is None
    for positions in (-1, 1.0, True):
        with pytest.raises(ValueError, match=r"positions is .*; expected an integer from 0"):
            mc.grown(model, state, positions)


def test_what_found_no_room_is_never_gone_on_from(backend):
    """A compiled program cannot make room. Its state says so, and can go back to where all had some."""
    model = built(backend, CONFIG)
    _, state = call(backend, model, tokens(CONFIG, 2, 14))
    full = mc.rewind(model, mc.grown(model, state, 18), 0)
    over = type(full)(tuple(_with_filled(backend, layer, 18) for layer in state.layers), state.segment)
    for use in (mc.room, lambda *given: mc.grown(*given, 1)):
        with pytest.raises(ValueError, match="the state has lost 2 positions, for which a compiled call had no room"):
            use(model, over)
    with pytest.raises(ValueError, match="the state has lost 2 positions"):
        call(backend, model, tokens(CONFIG, 2, 1), over)
    with pytest.raises(ValueError, match="1 were to be taken back; expected 2 at least, which found no room"):
        mc.rewind(model, over, 1)
    assert mc.room(model, mc.rewind(model, over, 4)) == 2


def _with_filled(backend, layer, count):
    return layer._replace(filled=backend.from_numpy(np.full(layer.filled.shape, count, np.int32)))


def test_the_bytes_are_those_of_the_arrays(backend):
    model = built(backend, MIXED)
    _, state = call(backend, model, tokens(MIXED, 2, 9))
    info = mc.state_info(model, state)
    d, n, k = MIXED.d_inner, MIXED.d_state, MIXED.d_conv
    first, second, _ = info.layers
    assert first == (0, {"conv": 4 * 2 * (k - 1) * d, "ssm": 4 * 2 * d * n}, None, None)
    cache = 4 * 2 * 16 * MIXED.num_kv_heads * (MIXED.d_model // MIXED.num_heads)
    assert second == (1, {"keys": cache, "values": cache, "filled": 8}, 16, (9, 9))
    assert info.rows == 2
    assert info.bytes == 2 * first.total + second.total + 8
    told = f"layer 1: {second.total:,} bytes (keys {cache:,}, values {cache:,}, filled 8); filled 9, 9 of 16"
    assert str(info).splitlines()[2] == told
    assert info.to_dict()["layers"][1]["capacity"] == 16


@pytest.mark.parametrize("use", [mc.state_info, mc.room, lambda *given: mc.rewind(*given, 0)])
def test_another_state_is_refused(backend, use):
    model = built(backend, CONFIG)
    with pytest.raises(TypeError, match="state is NoneType; expected a State"):
        use(model, None)
    with pytest.raises(ValueError, match="layer 0 of the state carries conv, ssm; expected keys, values, filled"):
        use(model, built(backend, MIXED).init_state(2))
    wide = dataclasses.replace(CONFIG, d_model=2 * CONFIG.d_model)
    with pytest.raises(ValueError, match=r"layers.0.keys has shape .*; expected"):
        use(model, built(backend, wide).init_state(2))


def test_a_growing_state_moves_is_forked_and_rewound_elsewhere(backend, tmp_path):
    model, ids, more = built(backend, CONFIG), tokens(CONFIG, 2, 14), tokens(CONFIG, 3, 5, seed=1)
    _, state = call(backend, model, ids)
    forked = mc.rewind(model, backend.fork(state, np.array([1, 0, 1])), [3, 0, 5])
    wanted, after = call(backend, model, more, forked)
    mc.save_state(forked, tmp_path / "state.safetensors", model)
    for name in installed():
        there = registry.get(name)
        other = there.build(CONFIG, initial_values(CONFIG, 1))
        loaded = mc.load_state(tmp_path / "state.safetensors", other)
        assert mc.state_info(other, loaded).layers[0].filled == (11, 14, 9)
        found, end = call(there, other, more, loaded)
        assert_close(found, wanted, "float32", "value", f"{backend.name} to {name}")
        assert mc.room(other, end) == mc.room(model, after) == 32 - 19
        assert mc.state_info(other, mc.rewind(other, end, 5)).layers[0].filled == (11, 14, 9)
