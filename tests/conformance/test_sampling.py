"""One choice on a backend, `choose` and `distribution`: filters, penalties, draws, ties, and what has no token."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backend import Context
from mamba_core.sampling import Sampling, Uniforms
from mamba_core.spec import sampling as spec

from .cases.mamba import CONFIGS


@pytest.fixture(scope="module")
def model(backend):
    return mc.build(CONFIGS["base"], backend=backend.name)


def native(backend, model, value):
    return None if value is None else backend.from_numpy(value, device=model.device)


def context_of(backend, model, shape, prompt=None, counts=None, bias=None):
    """A context in the backend's arrays, from NumPy."""
    prompt = np.zeros(shape, bool) if prompt is None else prompt
    counts = np.zeros(shape, np.int32) if counts is None else counts
    values = np.zeros(shape[0], np.int32), prompt, counts, np.zeros((), np.int32), bias
    return Context(*(native(backend, model, value) for value in values))


def chosen(backend, model, logits, sampling, uniform=None, context=None):
    """(tokens, log-probabilities) as the backend chooses, in NumPy."""
    choice = backend.choose(native(backend, model, logits), context, native(backend, model, uniform), sampling)
    return backend.to_numpy(choice.tokens), backend.to_numpy(choice.logprobs)


FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=3),
    Sampling(temperature=2.0, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, top_k=6, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.0),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1e-3),
    Sampling(temperature=1e19),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_sampling_inverts_the_distribution(backend, model, sampling):
    """A grid of u gives every token in proportion to its probability after the filters, to the grid's resolution."""
    logits = np.random.default_rng(0).normal(size=9).astype(np.float32) * 2
    count = 4000
    uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
    drawn, logprobs = chosen(backend, model, np.tile(logits, (count, 1)), sampling, uniform)
    frequency = np.bincount(drawn, minlength=9) / count
    np.testing.assert_allclose(frequency, spec.distribution(logits.astype(np.float64), sampling), atol=1.5 / count)
    log_softmax = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, log_softmax[drawn], atol=1e-5)


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_100000_draws_are_of_the_distribution(backend, model, sampling):
    """Pearson's chi-square with the random numbers of `Uniforms`, whose chance of failing by bad luck is 1e-6."""
    logits = np.random.default_rng(3).normal(size=20).astype(np.float32) * 2
    wanted = spec.distribution(logits.astype(np.float64), sampling)
    uniform = Uniforms(11, 100)(0, 1000).ravel()
    # MLX on CUDA sorts at most 65,535 rows.
    halves = [chosen(backend, model, np.tile(logits, (50_000, 1)), sampling, half) for half in np.split(uniform, 2)]
    found = sum(np.bincount(drawn, minlength=20) for drawn, _ in halves)
    assert not found[wanted == 0].any()
    often = wanted * 100_000 >= 5
    found, wanted = np.append(found[often], found[~often].sum()), np.append(wanted[often], wanted[~often].sum()) * 1e5
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    # The quantile by Wilson and Hilferty (1931).
    freedom = max(len(wanted) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.7534 * np.sqrt(2 / (9 * freedom))) ** 3
    assert ((found - wanted) ** 2 / wanted).sum() <= limit


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_log_probabilities_after_the_filters(backend, model, vocabulary, sampling):
    """Those of the float64 definition: to float32 tolerance, and so those of the other backends."""
    # Of this seed no nucleus ends within rounding of a token: the nearest is 7e-5 away.
    logits = np.random.default_rng((3, vocabulary)).normal(size=(3, vocabulary)).astype(np.float32) * 3
    found = backend.to_numpy(backend.distribution(native(backend, model, logits), None, sampling)).astype(np.float64)
    found /= found.sum(-1, keepdims=True)
    for row, values in zip(found, logits.astype(np.float64), strict=True):
        wanted = spec.distribution(values, sampling)
        # float32 has nothing below 1e-38, and few digits just above.
        whole = wanted > 1e-36
        np.testing.assert_array_equal(row[whole] > 0, True)
        assert row[wanted == 0].max(initial=0.0) == 0
        # The logits differ by up to 25; divided by the temperature their rounding counts for that much more.
        rounding = 25 / min(sampling.temperature, 1.0) * 2**-23
        np.testing.assert_allclose(np.log(row[whole]), np.log(wanted[whole]), rtol=0, atol=max(1e-5, rounding))


PENALTIES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.8},
    {"frequency_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.3, "presence_penalty": -0.4, "frequency_penalty": 0.9},
    {},
]


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
@pytest.mark.parametrize("bias", [None, {2: 1.5, 3: -np.inf, 7: -0.25}], ids=["", "bias"])
def test_penalties_and_bias(backend, model, settings, bias):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 9)).astype(np.float32)
    prompts, generated = rng.integers(0, 9, (4, 3)), rng.integers(0, 9, (4, 5))
    prompt, counts = np.zeros(logits.shape, bool), np.zeros(logits.shape, np.int32)
    for row in range(4):
        prompt[row, prompts[row]] = True
        np.add.at(counts[row], generated[row], 1)
    biases = None if bias is None else np.array([bias.get(token, 0.0) for token in range(9)], np.float32)
    sampling, greedy = Sampling(temperature=0.7, **settings), Sampling(**settings)
    context = context_of(backend, model, logits.shape, prompt, counts, biases)
    found = backend.to_numpy(backend.distribution(native(backend, model, logits), context, sampling))
    tokens, logprobs = chosen(backend, model, logits, greedy, context=context)
    for row in range(4):
        wanted = spec.adjusted(logits[row], sampling, prompts[row].tolist(), generated[row].tolist(), biases)
        np.testing.assert_allclose(found[row] / found[row].sum(), spec.distribution(wanted, sampling), atol=1e-6)
        assert tokens[row] == wanted.argmax()
        raw = logits[row].astype(np.float64)
        np.testing.assert_allclose(logprobs[row], raw[tokens[row]] - np.log(np.exp(raw).sum()), atol=1e-6)


def test_ties_go_to_the_lower_id(backend, model):
    logits = np.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    tokens, _ = chosen(backend, model, logits, Sampling())
    assert tokens.tolist() == [1, 0]
    for u in (0.0, 0.5, 0.999999):
        tokens, _ = chosen(backend, model, logits, Sampling(temperature=1.0, top_k=1), np.full(2, u, np.float32))
        assert tokens.tolist() == [1, 0]


def test_ties_in_a_large_vocabulary(backend, model):
    logits = np.zeros((2, 50_280), np.float32)
    logits[:, [40_000, 123, 50_279]] = 1.0
    assert chosen(backend, model, logits, Sampling())[0].tolist() == [123, 123]
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 2, "top_p": 1e-9}):
        sampling = Sampling(temperature=1.0, **settings)
        assert chosen(backend, model, logits, sampling, np.full(2, 0.9, np.float32))[0].tolist() == [123, 123]
    choice = backend.choose(native(backend, model, logits), None, None, Sampling(top_logprobs=4))
    assert backend.to_numpy(choice.top_tokens).tolist() == [[123, 40_000, 50_279, 0]] * 2
    logprobs = backend.to_numpy(choice.top_logprobs)
    wanted = np.array([1.0, 1.0, 1.0, 0.0]) - np.log(3 * np.e + 50_277)
    # One float32 after another, a sum of 50,280 may round by a few 1e-5 of itself.
    np.testing.assert_allclose(logprobs, [wanted] * 2, atol=5e-5)


def test_more_likeliest_than_there_are(backend, model):
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    choice = backend.choose(native(backend, model, logits), None, None, Sampling(top_logprobs=9))
    assert backend.to_numpy(choice.top_tokens).tolist() == [[1, 2, 0]]


def test_the_largest_uniform_gives_a_token_that_was_kept(backend, model):
    logits = np.array([[5.0, 1.0, -50.0, -60.0]], np.float32)
    almost = np.array([np.nextafter(np.float32(1), np.float32(0))])
    for sampling in FILTERS:
        tokens, _ = chosen(backend, model, logits, sampling, almost)
        assert spec.distribution(logits[0].astype(np.float64), sampling)[tokens[0]] > 0


@pytest.mark.parametrize(
    "sampling", [Sampling(), *FILTERS, Sampling(temperature=1.0, repetition_penalty=2.0, presence_penalty=1.0)], ids=str
)
def test_what_has_no_token(backend, model, sampling):
    """The rows beside it choose as they would without it."""
    logits = np.random.default_rng(5).normal(size=(6, 9)).astype(np.float32)
    uniform = np.linspace(0, 0.9, 6).astype(np.float32)
    context = context_of(backend, model, logits.shape)
    wanted, wanted_logprobs = chosen(backend, model, logits, sampling, uniform, context)
    logits[1] = -np.inf
    logits[2, 4] = np.nan
    logits[3] = np.nan
    logits[4, 0] = np.inf
    tokens, logprobs = chosen(backend, model, logits, sampling, uniform, context)
    assert tokens[1:5].tolist() == [0, 0, 0, 0]
    assert logprobs[1] == -np.inf
    assert np.isnan(logprobs[2:5]).all()
    for row in (0, 5):
        assert (tokens[row], logprobs[row]) == (wanted[row], wanted_logprobs[row])


@pytest.mark.parametrize("sampling", [Sampling(), *FILTERS], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_a_processor_makes_no_number(backend, model, sampling, value):
    logits = np.random.default_rng(5).normal(size=(2, 9)).astype(np.float32)
    added = np.zeros((2, 9), np.float32)
    added[1, 4] = value
    array = native(backend, model, added)
    processed = dataclasses.replace(sampling, processors=(lambda logits, context: logits + array,))
    tokens, logprobs = chosen(
        backend, model, logits, processed, np.full(2, 0.5, np.float32), context_of(backend, model, logits.shape)
    )
    assert tokens[1] == 0
    assert np.isfinite(logprobs[0])
    assert np.isnan(logprobs[1])


@pytest.mark.parametrize("sampling", [Sampling(), *FILTERS], ids=str)
def test_a_masked_token_is_never_chosen(backend, model, sampling):
    logits = np.full((1000, 9), -np.inf, np.float32)
    logits[:, [3, 5]] = 1.0, 0.5
    uniform = np.linspace(0, 1, 1000, endpoint=False).astype(np.float32)
    tokens, logprobs = chosen(backend, model, logits, sampling, uniform)
    assert set(tokens.tolist()) <= {3, 5}
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("largest", [True, False])
def test_processors_see_the_penalised_logits_and_have_the_last_word(backend, model, largest):
    logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    forbid = native(backend, model, np.array([[0.0, -np.inf, 0.0]], np.float32))
    seen = []

    def processor(logits, context):
        seen.append((backend.to_numpy(logits).tolist(), backend.to_numpy(context.counts).tolist()))
        return logits + forbid

    context = context_of(backend, model, logits.shape, counts=np.array([[3, 0, 0]], np.int32))
    sampling = Sampling(presence_penalty=3.0 if largest else 0.0, processors=processor)
    tokens, _ = chosen(backend, model, logits, sampling, context=context)
    assert seen == [([[-1.0 if largest else 2.0, 1.0, 0.0]], [[3, 0, 0]])]
    assert tokens.tolist() == [2 if largest else 0]


def test_a_processor_that_returns_something_else_is_refused(backend, model):
    logits = native(backend, model, np.zeros((2, 5), np.float32))
    context = context_of(backend, model, (2, 5))
    for wrong in (lambda logits, context: logits[:, :3], lambda logits, context: None):
        with pytest.raises(TypeError, match="a processor returned"):
            backend.choose(logits, context, None, Sampling(processors=[wrong]))
