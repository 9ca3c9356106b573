"""The reference's gradients, written by hand, against finite differences of its values."""

import numpy as np
import pytest

from mamba_core.backend import LayerState, State
from mamba_core.config import MambaConfig
from mamba_core.spec import ops
from mamba_core.spec.init import initial_values
from mamba_core.spec.ops import selective_scan as scan_spec
from mamba_core.spec.reference import ReferenceModel
from mamba_core.tasks.lm import cross_entropy

STEP = 1e-6
RNG = np.random.default_rng(0)
B, L, E, N, K = 2, 6, 3, 2, 3
POSITIONS = {
    "plain": {},
    "mask": {"mask": np.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)},
    "segments": {"segment_ids": np.array([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 1, 1]])},
    "both": {
        "mask": np.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool),
        "segment_ids": np.array([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 1, 1]]),
    },
}
SCAN = {
    "x": RNG.normal(size=(B, L, E)), "delta": RNG.normal(size=(B, L, E)), "A": -np.exp(RNG.normal(size=(E, N))),
    "B": RNG.normal(size=(B, L, N)), "C": RNG.normal(size=(B, L, N)), "D": RNG.normal(size=E),
    "z": RNG.normal(size=(B, L, E)), "delta_bias": RNG.normal(size=E), "initial_state": RNG.normal(size=(B, E, N)),
}  # fmt: skip
# A negative step lets the state grow, and a difference of large numbers is no test.
POSITIVE_STEPS = SCAN | {name: np.abs(SCAN[name]) for name in ("delta", "delta_bias")}
CONV = {
    "x": SCAN["x"], "weight": RNG.normal(size=(E, K)), "bias": RNG.normal(size=E),
    "initial_state": RNG.normal(size=(B, K - 1, E)),
}  # fmt: skip


def differences(function, arrays, name):
    """The gradient of a scalar function in one of its arrays, by central differences."""
    gradient = np.zeros_like(arrays[name])
    for index in np.ndindex(gradient.shape):
        shifted = []
        for sign in (1, -1):
            moved = arrays[name].copy()
            moved[index] += sign * STEP
            shifted.append(function(arrays | {name: moved}))
        gradient[index] = (shifted[0] - shifted[1]) / (2 * STEP)
    return gradient


def check(op, arrays, state_shape, **options):
    dy, dstate = RNG.normal(size=(B, L, E)), RNG.normal(size=state_shape)

    def total(given):
        y, state = ops.public()[op].forward(**given, **options, return_final_state=True)
        return (y * dy).sum() + (state * dstate).sum()

    gradients = ops.public()[op].vjp(dy, dstate, **arrays, **options)
    assert set(gradients) == set(arrays)
    for name in arrays:
        np.testing.assert_allclose(gradients[name], differences(total, arrays, name), atol=1e-7, err_msg=name)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("softplus", [True, False])
def test_scan_gradients(positions, softplus):
    arrays = SCAN if softplus else POSITIVE_STEPS
    check("selective_scan", arrays, (B, E, N), delta_softplus=softplus, **POSITIONS[positions])


def test_scan_gradients_without_what_is_optional():
    check("selective_scan", {name: POSITIVE_STEPS[name] for name in ("x", "delta", "A", "B", "C")}, (B, E, N))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_gradients(positions, activation):
    check("causal_conv", CONV, (B, K - 1, E), activation=activation, **POSITIONS[positions])


def test_model_gradients():
    """Every parameter and the state, through the loss and the final state, with a mask and segments."""
    config = MambaConfig(
        d_model=6, n_layer=2, vocab_size=11, d_state=3, d_conv=3, dt_rank=2, bias=True, tie_embeddings=False,
        pad_vocab_size_multiple=1, initializer_range=1.0,
    )  # fmt: skip
    parameters = {name: value.astype(float) for name, value in initial_values(config, 1)}
    ids, targets = RNG.integers(0, 11, (2, 2, L))
    positions = POSITIONS["both"]
    before = ReferenceModel(config, parameters)(ids, segment_ids=np.array([[0] * L, [7] * L])).state
    dlayers = tuple(LayerState(*(RNG.normal(size=value.shape) for value in layer)) for layer in before.layers)

    def total(parameters, state=before):
        out = ReferenceModel(config, parameters)(ids, state, **positions)
        loss, _ = cross_entropy(out.logits, targets, positions["mask"])
        pairs = zip(out.state.layers, dlayers, strict=True)
        return loss + sum((a * b).sum() for layer, dlayer in pairs for a, b in zip(layer, dlayer, strict=True))

    model = ReferenceModel(config, parameters)
    _, dlogits = cross_entropy(model(ids, before, **positions).logits, targets, positions["mask"])
    gradients, state_gradients = model.vjp(dlogits, ids, before, **positions, dstate=State(dlayers, None))
    for name, value in parameters.items():
        for index in list(np.ndindex(value.shape))[:: max(1, value.size // 7)]:
            one = {name: value.copy()}
            one[name][index] += STEP
            two = {name: value.copy()}
            two[name][index] -= STEP
            expected = (total(parameters | one) - total(parameters | two)) / (2 * STEP)
            assert gradients[name][index] == pytest.approx(expected, abs=1e-7), (name, index)
    # Row 1 begins another segment, so its state is not used: its gradient is zero.
    for layer, (state_gradient, value) in enumerate(zip(state_gradients, before.layers, strict=True)):
        for field in value._fields:
            assert not getattr(state_gradient, field)[1].any()
            array = getattr(value, field)
            for index in list(np.ndindex(array[:1].shape))[::3]:
                shifted = [total(parameters, moved(before, layer, field, index, sign * STEP)) for sign in (1, -1)]
                expected = (shifted[0] - shifted[1]) / (2 * STEP)
                assert getattr(state_gradient, field)[index] == pytest.approx(expected, abs=1e-7)


def test_embeddings_take_the_place_of_ids():
    """Their output and their gradient are those of ids that look up the same rows."""
    config = MambaConfig(d_model=6, n_layer=1, vocab_size=11, tie_embeddings=False, pad_vocab_size_multiple=1)
    parameters = {name: value.astype(float) for name, value in initial_values(config, 1)}
    model, table = ReferenceModel(config, parameters), parameters["backbone.embeddings.weight"]
    ids = np.arange(2 * L).reshape(2, L) % 11
    found, expected = model(inputs_embeds=table[ids]), model(ids)
    np.testing.assert_array_equal(found.logits, expected.logits)
    doutput = RNG.normal(size=expected.logits.shape)
    found, _ = model.vjp(doutput, inputs_embeds=table[ids])
    expected, _ = model.vjp(doutput, ids)
    gradient = np.zeros_like(table)
    np.add.at(gradient, ids, found["inputs_embeds"])
    np.testing.assert_allclose(gradient, expected["backbone.embeddings.weight"], rtol=1e-12)
    assert not found["backbone.embeddings.weight"].any()
    for given in ({}, {"inputs": ids, "inputs_embeds": table[ids]}):
        with pytest.raises(TypeError, match="expected input_ids or inputs_embeds"):
            model(**given)


def moved(state, layer, field, index, by):
    array = getattr(state.layers[layer], field).copy()
    array[index] += by
    layers = list(state.layers)
    layers[layer] = layers[layer]._replace(**{field: array})
    return State(tuple(layers), state.segment)


def test_masked_positions_are_as_if_absent():
    """The definition of the mask and of segments: cut the sequence up and run the pieces."""
    mask, segments = POSITIONS["both"]["mask"][0], POSITIONS["both"]["segment_ids"][0]
    row = {name: SCAN[name][:1] for name in ("x", "delta", "B", "C", "z")}
    whole = {name: SCAN[name] for name in ("A", "D", "delta_bias")}
    y, h = scan_spec.selective_scan(
        **row, **whole, initial_state=SCAN["initial_state"][:1], mask=mask[None], segment_ids=segments[None],
        return_final_state=True,
    )  # fmt: skip
    state = SCAN["initial_state"][:1]
    for segment in np.unique(segments):
        where = np.flatnonzero(mask & (segments == segment))
        piece = {name: value[:, where] for name, value in row.items()}
        expected, state = scan_spec.selective_scan(**piece, **whole, initial_state=state, return_final_state=True)
        np.testing.assert_allclose(y[:, where], expected, rtol=1e-13)
        last, state = state, np.zeros_like(state)
    np.testing.assert_allclose(h, last, rtol=1e-13)
    assert not y[0, ~mask].any()
