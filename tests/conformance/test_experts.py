"""Mixtures of experts that choose: the op on every kernel, and models whose experts are more than compute a position.

All in float32. In half precision rounding moves a router's logits across each other, and another expert is chosen.
"""

import inspect

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.jamba import JambaConfig
from mamba_core.spec.init import initial_values
from mamba_core.spec.ops import mixture_of_experts as spec
from mamba_core.spec.reference import ReferenceModel
from mamba_core.tasks.lm import cross_entropy

from .assertions import assert_close, assert_zero
from .models import assert_states
from .strategies import tokens
from .test_ops import runnable

OP = "mixture_of_experts"
SIZES = (2, 9, 6, 5, 4)  # b, l, d, i, experts


def drawn(seed=0, sizes=SIZES) -> dict[str, np.ndarray]:
    rng, (b, l, d, i, experts) = np.random.default_rng(seed), sizes
    shapes = {"x": (b, l, d), "logits": (b, l, experts), "gate_up": (experts, 2 * i, d), "down": (experts, d, i)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def check(backend, arrays, top_k: int, mask=None):
    """Values and gradients of every kernel that runs here equal the reference's."""
    expected = spec.mixture_of_experts(**arrays, top_k=top_k, mask=mask)
    dy = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    wanted = spec.mixture_of_experts_vjp(dy, **arrays, top_k=top_k, mask=mask)
    given = {} if mask is None else {"mask": backend.from_numpy(mask)}
    for kernel in runnable(backend, OP):

        def run(*values, kernel=kernel):
            named = dict(zip(arrays, values, strict=True))
            return (mc.mixture_of_experts(**named, top_k=top_k, kernel=kernel, **given),)

        inputs = [backend.from_numpy(value) for value in arrays.values()]
        (y,), gradients = backend.vjp(run, inputs, [backend.from_numpy(dy)])
        assert_close(y, expected, "float32", "value", f"{kernel}: y")
        for name, gradient in zip(arrays, gradients, strict=True):
            assert_close(gradient, wanted[name], "float32", "gradient", f"{kernel}: gradient of {name}")
        if mask is not None:
            assert_zero(y[~mask], f"{kernel}: y at masked positions")


def value(backend, arrays, kernel="auto", mask=None, **options) -> np.ndarray:
    native = {name: backend.from_numpy(array) for name, array in arrays.items()}
    given = {} if mask is None else {"mask": backend.from_numpy(mask)}
    return backend.to_numpy(mc.mixture_of_experts(**native, kernel=kernel, **given, **options))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_kernel_equals_the_reference(backend, top_k, masked):
    mask = np.random.default_rng(2).random(SIZES[:2]) < 0.7 if masked else None
    check(backend, drawn(), top_k, mask)


@pytest.mark.parametrize("sizes", [(1, 1, 6, 5, 4), (3, 1, 1, 1, 2), (1, 40, 8, 3, 1), (1, 3, 8, 16, 30)], ids=str)
def test_odd_sizes(backend, sizes):
    """One position, as in decoding; one expert; more experts than positions."""
    check(backend, drawn(sizes=sizes), min(2, sizes[-1]))


def test_experts_that_nobody_chooses(backend):
    """They get no gradient, also where what they hold is not finite."""
    arrays = drawn()
    arrays["logits"][..., [0, 2]] = -20.0
    check(backend, arrays, 2)
    arrays["gate_up"][0], arrays["down"][2] = np.nan, np.inf
    for kernel in runnable(backend, OP):
        assert np.isfinite(value(backend, arrays, kernel, top_k=2)).all(), kernel


def test_of_equal_logits_the_lower_number_is_first(backend):
    arrays = drawn()
    arrays["logits"][:] = 0.5
    check(backend, arrays, 2)
    arrays["logits"] = np.round(drawn()["logits"])  # some equal, some not
    arrays["logits"][:, ::2, 3] = arrays["logits"][:, ::2, 1]
    check(backend, arrays, 1)
    check(backend, arrays, 3)


def test_large_logits(backend):
    arrays = drawn()
    arrays["logits"] *= 100
    check(backend, arrays, 2)


def test_nothing_counts(backend):
    check(backend, drawn(), 2, np.zeros(SIZES[:2], bool))


def test_no_positions(backend):
    for kernel in runnable(backend, OP):
        assert value(backend, drawn(sizes=(2, 0, 6, 5, 4)), kernel, top_k=2).shape == (2, 0, 6)


def test_masked_positions_do_not_leak_what_is_not_finite(backend):
    arrays, mask = drawn(), np.random.default_rng(2).random(SIZES[:2]) < 0.7
    spoilt = dict(arrays)
    for name in ("x", "logits"):
        spoilt[name] = np.where(mask[..., None], arrays[name], np.float32("nan"))
    dy = np.ones(SIZES[:3], np.float32)
    for kernel in runnable(backend, OP):

        def run(*values, kernel=kernel):
            named = dict(zip(arrays, values, strict=True))
            return (mc.mixture_of_experts(**named, top_k=2, mask=backend.from_numpy(mask), kernel=kernel),)

        found = []
        for given in (arrays, spoilt):
            inputs = [backend.from_numpy(value) for value in given.values()]
            (y,), gradients = backend.vjp(run, inputs, [backend.from_numpy(dy)])
            found.append([y, *gradients])
        for clean, other in zip(*found, strict=True):
            np.testing.assert_array_equal(other, clean)


def test_a_row_does_not_depend_on_its_neighbours(backend):
    """However many positions another expert has: none is dropped."""
    arrays = drawn(sizes=(2, 40, 6, 5, 4))
    arrays["logits"][:, 1:, 0] += 20
    for kernel in runnable(backend, OP):
        whole = value(backend, arrays, kernel, top_k=2)
        alone = arrays | {name: arrays[name][1:, 3:5] for name in ("x", "logits")}
        assert_close(value(backend, alone, kernel, top_k=2), whole[1:, 3:5], "float32", "value", kernel)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backend, dtype):
    """The choice and its weights are float32's."""
    arrays = drawn(sizes=(2, 30, 16, 8, 4))
    native = {name: backend.from_numpy(array, dtype=dtype) for name, array in arrays.items()}
    seen = {name: backend.to_numpy(array).astype(np.float64) for name, array in native.items()}
    for kernel in runnable(backend, OP):
        y = backend.to_numpy(mc.mixture_of_experts(**native, top_k=2, kernel=kernel))
        assert y.dtype.name == dtype
        assert_close(y, spec.mixture_of_experts(**seen, top_k=2), dtype, "value", kernel)


BAD = {
    "x": ((2, 5), r"x has shape \(2, 5\); expected \(b, l, d\)"),
    "logits": ((2, 5, 3), r"logits has shape .*expected \(b, l, experts\) = \(2, 5, 4\)"),
    "gate_up": ((4, 7, 6), "gate_up has 7 rows; expected an even number"),
    "down": ((4, 6, 4), r"down has shape .*expected \(experts, d, i\) = \(4, 6, 5\)"),
    "mask": ((2, 4), r"mask has shape .*expected \(b, l\) = \(2, 5\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_faults_of_the_arguments_are_named(backend, name):
    shapes = {key: array.shape for key, array in drawn(sizes=(2, 5, 6, 5, 4)).items()} | {"mask": (2, 5)}
    shapes[name], words = BAD[name]
    arrays = {key: np.ones(shape, bool if key == "mask" else np.float32) for key, shape in shapes.items()}
    for given in (arrays, {key: backend.from_numpy(array) for key, array in arrays.items()}):
        with pytest.raises(ValueError, match=words):
            mc.mixture_of_experts(**given, top_k=2)


@pytest.mark.parametrize("top_k", [0, 5, True, 1.0])
def test_a_number_of_experts_that_is_none_is_refused(backend, top_k):
    arrays = drawn()
    for given in (arrays, {name: backend.from_numpy(array) for name, array in arrays.items()}):
        with pytest.raises(ValueError, match=f"top_k is {top_k}; expected an integer from 1 to 4"):
            mc.mixture_of_experts(**given, top_k=top_k)


def test_one_signature_everywhere(backend):
    def arguments(function):
        found = inspect.signature(function).parameters.values()
        return [(item.name, item.kind, item.default) for item in found]

    wanted = arguments(mc.mixture_of_experts)
    assert arguments(backend.op(OP).mixture_of_experts) == wanted
    assert arguments(spec.mixture_of_experts) == wanted[:-1]
    assert list(backend.available_kernels()[OP].values())[-1] is None, "the last is the plain one, which always runs"


# --- models ------------------------------------------------------------------------------------------------

CONFIG = JambaConfig(
    d_model=16, n_layer=4, vocab_size=31, d_state=4, dt_rank=3, num_heads=4, num_kv_heads=2, d_intermediate=12,
    attn_layer_period=3, attn_layer_offset=1, num_experts=6, num_experts_per_tok=2, initializer_range=0.3,
)  # fmt: skip
# Of two logits between which a choice is made: float32 does not turn their order.
LEAST_DISTANCE = 1e-4


@pytest.fixture(scope="module")
def reference():
    return ReferenceModel(CONFIG, dict(initial_values(CONFIG, 3)))


def check_distances(reference, *given, **positions):
    """The test's own ground: no choice is so close that rounding turns it."""
    values = {}
    reference(*given, **positions, observe=values.__setitem__)
    for name, logits in values.items():
        if name.endswith("router"):
            ordered = np.sort(logits, axis=-1)
            distance = ordered[..., -CONFIG.num_experts_per_tok] - ordered[..., -CONFIG.num_experts_per_tok - 1]
            assert distance.min() > LEAST_DISTANCE, (name, distance.min())


def test_a_model_that_chooses_equals_the_reference(backend, reference):
    """A prompt, padded rows, a continuation in one call, and steps."""
    model = mc.build(CONFIG, backend=backend.name, seed=3)
    ids, mask = tokens(CONFIG, 3, 24), np.arange(20) >= np.array([[0], [7], [19]])
    check_distances(reference, ids)
    wanted = reference(ids[:, :20], mask=mask)
    native = backend.from_numpy(ids, device=model.device)
    out = model(native[:, :20], mask=backend.from_numpy(mask, device=model.device))
    for where in (slice(20, 22), slice(22, 23), slice(23, 24)):
        assert_close(backend.to_numpy(out.logits), wanted.logits, "float32", "value", f"logits before {where}")
        assert_states(backend, CONFIG, out.state, wanted.state, f"before {where}")
        wanted, out = reference(ids[:, where], wanted.state), model(native[:, where], out.state)
    assert_close(backend.to_numpy(out.logits), wanted.logits, "float32", "value", "the last logits")


@pytest.mark.parametrize("remat", [False, True])
def test_its_gradients_equal_the_reference_s(backend, reference, remat):
    model, ids = mc.build(CONFIG, backend=backend.name, seed=3), tokens(CONFIG, 2, 21, seed=1)
    check_distances(reference, ids[:, :-1])
    model.remat = remat
    loss, gradients = backend.loss_and_gradients(model, ids)
    wanted, dlogits = cross_entropy(reference(ids[:, :-1]).logits, ids[:, 1:])
    expected, _ = reference.vjp(dlogits, ids[:, :-1])
    assert loss == pytest.approx(wanted, abs=1e-5)
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], atol=2e-4 * scale, err_msg=name)


def test_it_generates_what_the_reference_does(backend, reference):
    model, prompt = mc.build(CONFIG, backend=backend.name, seed=3), tokens(CONFIG, 1, 5).tolist()[0]
    new = mc.generate(model, prompt, max_new_tokens=20).tokens[0]  # past the least capacity
    assert new == [int(token) for token in greedy(reference, prompt, 20)]


def greedy(reference, prompt, count):
    out = reference(np.array([prompt]))
    for _ in range(count):
        token = out.logits[0, -1, : CONFIG.vocab_size].argmax()
        yield token
        out = reference(np.array([[token]]), out.state)
