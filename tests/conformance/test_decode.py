"""Decoding on a backend: greedy and sampled tokens, filters, ragged batches, and what is never produced."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backend import Context
from mamba_core.sampling import Sampling
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

from .strategies import CONFIGS, tokens

CONFIG = dataclasses.replace(CONFIGS["base"], initializer_range=1.0)
PROMPTS = [tokens(CONFIG, 1, length, seed=length)[0].tolist() for length in (7, 1, 12)]


@pytest.fixture(scope="module")
def model(backend):
    return mc.build(CONFIG, backend=backend.name, seed=2)


@pytest.fixture(scope="module")
def reference():
    return ReferenceModel(CONFIG, dict(initial_values(CONFIG, 2)))


def greedy(reference, prompt, count):
    """Token by token from the float64 model, the whole sequence again for each."""
    row, logprobs = list(prompt), []
    for _ in range(count):
        logits = reference(np.array([row])).logits[0, -1, : CONFIG.vocab_size]
        row.append(int(logits.argmax()))
        logprobs.append(logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return row[len(prompt) :], logprobs


def test_greedy_is_the_reference(model, reference):
    result = mc.generate(model, PROMPTS, max_new_tokens=12)
    for prompt, new, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        wanted, wanted_logprobs = greedy(reference, prompt, 12)
        assert new == wanted
        np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=1e-4, atol=1e-5)
    assert result.finish_reasons == ["length"] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 1000, "min_p": 0.05},
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(model, settings):
    together = mc.generate(model, PROMPTS, max_new_tokens=10, seed=4, **settings)
    first = mc.generate(model, PROMPTS[0], max_new_tokens=10, seed=4, **settings)
    assert first.tokens[0] == together.tokens[0]


def test_padded_vocabulary_is_never_produced(backend):
    """The padded rows of the embedding are made the likeliest by far."""
    config = dataclasses.replace(CONFIG, vocab_size=5, pad_vocab_size_multiple=8, tie_embeddings=False)
    values = dict(initial_values(config, 0))
    values["lm_head.weight"][5:] = 100 * np.sign(values["lm_head.weight"][:1])
    model = backend.build(config, values.items())
    for settings in ({}, {"temperature": 5.0}, {"temperature": 1.0, "top_k": 50}, {"temperature": 1.0, "top_p": 1.0}):
        produced = mc.generate(model, [[0], [1, 2]], max_new_tokens=20, **settings).tokens
        assert max(max(row) for row in produced) < 5


def native(backend, model, value):
    return None if value is None else backend.from_numpy(value, device=model.device)


def context_of(backend, model, shape, prompt=None, counts=None, bias=None):
    """A context in the backend's arrays, from NumPy."""
    prompt = np.zeros(shape, bool) if prompt is None else prompt
    counts = np.zeros(shape, np.int32) if counts is None else counts
    values = np.zeros(shape[0], np.int32), prompt, counts, np.zeros((), np.int32), bias
    return Context(*(native(backend, model, value) for value in values))


def chosen(backend, model, logits, sampling, uniform, context=None):
    """One choice of the backend's own `choose`, from NumPy."""
    choice = backend.choose(native(backend, model, logits), context, native(backend, model, uniform), sampling)
    return backend.to_numpy(choice.tokens), backend.to_numpy(choice.logprobs)


def kept(logits, sampling):
    """The probabilities after the filters, by the definition in `mamba_core.generation`, one at a time."""
    p = np.exp((np.float64(logits) - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    order = order[: sampling.top_k or len(order)]
    total, running, nucleus = sum(p[token] for token in order), 0.0, []
    for token in order:
        if nucleus and running >= sampling.top_p * total:
            break
        nucleus.append(token)
        running += p[token]
    survivors = [token for token in nucleus if p[token] >= sampling.min_p * p[order[0]]]
    out = np.zeros_like(p)
    out[survivors] = p[survivors]
    return out / out.sum()


FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=3),
    Sampling(temperature=2.0, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, top_k=6, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.0, top_p=0.0),
    Sampling(temperature=1e-3),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_sampling_inverts_the_distribution(backend, model, sampling):
    """A grid of u gives every token in proportion to its probability after the filters, to the grid's resolution."""
    logits = np.random.default_rng(0).normal(size=9).astype(np.float32) * 2
    count = 4000
    uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
    drawn, logprobs = chosen(backend, model, np.tile(logits, (count, 1)), sampling, uniform)
    frequency = np.bincount(drawn, minlength=9) / count
    np.testing.assert_allclose(frequency, kept(logits, sampling), atol=1.5 / count)
    log_softmax = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, log_softmax[drawn], atol=1e-5)


def test_ties_go_to_the_lower_id(backend, model):
    logits = np.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    tokens, _ = chosen(backend, model, logits, Sampling(), np.zeros(2, np.float32))
    assert tokens.tolist() == [1, 0]
    for u in (0.0, 0.5, 0.999999):
        tokens, _ = chosen(backend, model, logits, Sampling(temperature=1.0, top_k=1), np.full(2, u, np.float32))
        assert tokens.tolist() == [1, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative(backend, model):
    logits = np.array([[2.0, 1.5, -1.0], [-1.0, -1.5, -3.0]], np.float32)
    seen = np.array([[True, False, False], [True, False, False]])
    context = context_of(backend, model, logits.shape, prompt=seen)
    tokens, _ = chosen(backend, model, logits, Sampling(repetition_penalty=2.0), np.zeros(2, np.float32), context)
    assert tokens.tolist() == [1, 1]


def test_the_largest_uniform_gives_a_token_that_was_kept(backend, model):
    logits = np.array([[5.0, 1.0, -50.0, -60.0]], np.float32)
    almost = np.array([np.nextafter(np.float32(1), np.float32(0))])
    for sampling in FILTERS:
        tokens, _ = chosen(backend, model, logits, sampling, almost)
        assert kept(logits[0], sampling)[tokens[0]] > 0


def test_eos_ends_a_row_and_not_the_others(backend):
    values = dict(initial_values(CONFIG, 2))
    plain = mc.generate(backend.build(CONFIG, values.items()), PROMPTS, max_new_tokens=12)
    eos = plain.tokens[0][4]
    model = backend.build(dataclasses.replace(CONFIG, eos_token_id=eos), values.items())
    result = mc.generate(model, PROMPTS, max_new_tokens=12)
    for row, before in zip(result.tokens, plain.tokens, strict=True):
        end = before.index(eos) + 1 if eos in before else 12
        assert row == before[:end]
    assert result.finish_reasons[0] == "eos"


def test_greedy_over_a_longer_run(model, reference):
    """The reference steps from its own state here, so that its state is tested too."""
    out = reference(np.array([PROMPTS[2]]))
    wanted = []
    for _ in range(40):
        wanted.append(int(out.logits[0, -1, : CONFIG.vocab_size].argmax()))
        out = reference(np.array([[wanted[-1]]]), out.state)
    assert mc.generate(model, PROMPTS[2], max_new_tokens=40).tokens[0] == wanted
