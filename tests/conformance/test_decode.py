"""Decoding on a backend: greedy and sampled tokens, filters, ragged batches, and what is never produced."""

import dataclasses
import importlib
from contextlib import nullcontext

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import architectures, registry
from mamba_core.registry import installed
from mamba_core.sampling import Sampling, Uniforms
from mamba_core.spec import sampling as spec
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

from .assertions import assert_close
from .cases import bases, configs
from .cases.mamba import CONFIGS
from .models import assert_states
from .strategies import tokens

# Tied, a model that has learnt nothing repeats its last token for ever, whatever its state is.
CONFIG = dataclasses.replace(CONFIGS["base"], initializer_range=0.5, tie_embeddings=False)
PROMPTS = [tokens(CONFIG, 1, length, seed=length)[0].tolist() for length in (7, 1, 12)]


@pytest.fixture(scope="module")
def model(backend):
    return mc.build(CONFIG, backend=backend.name, seed=2)


@pytest.fixture(scope="module")
def reference():
    return ReferenceModel(CONFIG, dict(initial_values(CONFIG, 2)))


def without_gradients(backend):
    return importlib.import_module("torch").no_grad() if backend.name == "torch" else nullcontext()


def assert_same(result, wanted, rows=slice(None)):
    """The tokens, and their log-probabilities, which tell of states where the tokens would be the same without."""
    assert result.tokens == wanted.tokens[rows]
    for found, expected in zip(result.logprobs, wanted.logprobs[rows], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def greedy(reference, prompt, count, adjust=lambda logits, generated: logits):
    """Token by token from the float64 model, the whole sequence again for each: tokens, and all log-probabilities."""
    row, logprobs = list(prompt), []
    for _ in range(count):
        logits = reference(np.array([row])).logits[0, -1, : CONFIG.vocab_size]
        row.append(int(adjust(logits, row[len(prompt) :]).argmax()))
        logprobs.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return row[len(prompt) :], np.array(logprobs)


def test_greedy_is_the_reference(model, reference):
    result = mc.generate(model, PROMPTS, max_new_tokens=12)
    for prompt, new, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        wanted, wanted_logprobs = greedy(reference, prompt, 12)
        assert new == wanted
        np.testing.assert_allclose(logprobs, wanted_logprobs[range(12), wanted], rtol=1e-4, atol=1e-5)
    assert result.finish_reasons == ["length"] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 1000, "min_p": 0.05},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {3: 1.0}},
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(model, settings):
    together = mc.generate(model, PROMPTS, max_new_tokens=10, seed=[4, 5, 6], **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = mc.generate(model, prompt, max_new_tokens=10, seed=4 + row, **settings)
        assert_same(alone, together, slice(row, row + 1))


def test_padded_vocabulary_is_never_produced(backend):
    """The padded rows of the embedding are made the likeliest by far."""
    config = dataclasses.replace(CONFIG, vocab_size=5, pad_vocab_size_multiple=8)
    values = dict(initial_values(config, 0))
    values["lm_head.weight"][5:] = 100 * np.sign(values["lm_head.weight"][:1])
    model = backend.build(config, values.items())
    for settings in ({}, {"temperature": 5.0}, {"temperature": 1.0, "top_k": 50}, {"temperature": 1.0, "top_p": 1.0}):
        produced = mc.generate(model, [[0], [1, 2]], max_new_tokens=20, **settings).tokens
        assert max(max(row) for row in produced) < 5


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


@pytest.mark.parametrize("name", bases())
def test_every_architecture_decodes_as_the_reference(backend, name):
    """Ragged prompts in chunks, several tokens, and on from the state after them."""
    config = dataclasses.replace(bases()[name], initializer_range=0.5)
    if not architectures.traits(config).steps:
        pytest.skip(f"{name} has no steps")
    reference = ReferenceModel(config, dict(initial_values(config, 2)))
    model = mc.build(config, backend=backend.name, seed=2)
    prompts = [tokens(config, 1, length, seed=length)[0].tolist() for length in (7, 1, 12)]
    rows, given, state = [[] for _ in prompts], prompts, None
    for count in (7, 4):
        result = mc.generate(
            model, given, max_new_tokens=count, prefill_chunk=5, state=state, return_state=True, temperature=1.0
        )
        rows = [row + more for row, more in zip(rows, given, strict=True)]
        for row, new, logprobs in zip(rows, result.tokens, result.logprobs, strict=True):
            before = len(row)
            row += new
            wanted = reference(np.array([row[:-1]])).logits[0, before - 1 :, : config.vocab_size]
            wanted = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
            np.testing.assert_allclose(logprobs, wanted[range(count), new], rtol=1e-4, atol=1e-5)
        state, given = result.state, [[1, 2], [3], [4, 0, 1]]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.7},
        {"logit_bias": {0: -np.inf, 4: 2.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties_follow_what_is_generated(model, reference, settings):
    bias = np.array([settings.get("logit_bias", {}).get(token, 0.0) for token in range(CONFIG.vocab_size)])
    sampling = Sampling(**{name: value for name, value in settings.items() if name != "logit_bias"})
    result = mc.generate(model, PROMPTS, max_new_tokens=14, **settings)
    for prompt, new in zip(PROMPTS, result.tokens, strict=True):

        def adjust(logits, generated, prompt=prompt):
            return spec.adjusted(logits, sampling, prompt, generated, bias)

        assert new == greedy(reference, prompt, 14, adjust)[0]


def test_processors_run_in_the_step_with_its_context(backend, model):
    """Each token must be the last one and one more, but every third one two more."""
    v = CONFIG.vocab_size
    steps = np.full((2, v, v), -np.inf, np.float32)
    for token in range(v):
        steps[0, token, (token + 1) % v] = steps[1, token, (token + 2) % v] = 0.0
    table = backend.from_numpy(steps, device=model.device)
    calls = []

    def follow(logits, context):
        calls.append(1)
        return logits + table[((context.step % 3) == 2) * 1][context.last]

    for settings in ({}, {"temperature": 2.0, "top_p": 0.9}):
        result = mc.generate(model, PROMPTS, max_new_tokens=7, processors=[follow], **settings)
        for prompt, new in zip(PROMPTS, result.tokens, strict=True):
            moves = np.diff([prompt[-1], *new]) % v
            assert moves.tolist() == [1, 1, 2, 1, 1, 2, 1]
    # Compiled, a function is called when it is traced, and not for each of twice 7 tokens. On a CPU JAX's step is.
    assert backend.name != "jax" or len(calls) < 14


def test_where_nothing_is_left_to_choose_a_row_ends(backend, model):
    v = CONFIG.vocab_size
    ban = np.zeros((v, v), np.float32)
    plain = mc.generate(model, PROMPTS, max_new_tokens=8).tokens
    ban[plain[0][3]] = -np.inf
    table = backend.from_numpy(ban, device=model.device)
    result = mc.generate(
        model, PROMPTS, max_new_tokens=8, processors=lambda logits, context: logits + table[context.last]
    )
    for new, whole, reason in zip(result.tokens, plain, result.finish_reasons, strict=True):
        end = whole.index(plain[0][3]) + 1 if plain[0][3] in whole[:-1] else 8
        assert new == whole[:end]
        assert reason == ("length" if end == 8 else "masked")
    assert result.finish_reasons[0] == "masked"


def test_logits_that_are_not_numbers_end_a_row(backend):
    """Row 0 reads a token whose embedding is NaN; the others do not."""
    values = dict(initial_values(CONFIG, 2))
    values["backbone.embeddings.weight"][PROMPTS[0][2]] = np.nan
    model = backend.build(CONFIG, values.items())
    others = [[token for token in prompt if token != PROMPTS[0][2]] or [0] for prompt in PROMPTS]
    for settings in ({}, {"temperature": 1.0, "top_k": 4, "presence_penalty": 1.0}):
        banned = {"logit_bias": {PROMPTS[0][2]: -np.inf}} | settings
        wanted = mc.generate(model, others, max_new_tokens=5, **banned).tokens
        result = mc.generate(model, [PROMPTS[0], *others[1:]], max_new_tokens=5, **banned)
        assert result.tokens == [[], *wanted[1:]]
        assert result.finish_reasons == ["nan", "length", "length"]


def test_the_likeliest_tokens(model, reference):
    result = mc.generate(model, PROMPTS, max_new_tokens=5, top_logprobs=3, temperature=1.0, seed=5)
    for prompt, new, tops, logprobs in zip(PROMPTS, result.tokens, result.top_logprobs, result.logprobs, strict=True):
        row = list(prompt)
        for token, top, logprob in zip(new, tops, logprobs, strict=True):
            logits = reference(np.array([row])).logits[0, -1, : CONFIG.vocab_size]
            wanted = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            assert [one for one, _ in top] == np.argsort(-wanted, kind="stable")[:3].tolist()
            np.testing.assert_allclose([value for _, value in top], np.sort(wanted)[::-1][:3], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(logprob, wanted[token], rtol=1e-4, atol=1e-5)
            row.append(token)


def test_seeds(model):
    settings = {"max_new_tokens": 12, "temperature": 1.5}
    again = [mc.generate(model, PROMPTS, seed=seed, **settings).tokens for seed in (7, 7, 8)]
    assert again[0] == again[1] != again[2]
    each = mc.generate(model, PROMPTS, seed=[3, 2**64 - 1, 3], **settings).tokens
    for prompt, seed, new in zip(PROMPTS, [3, 2**64 - 1, 3], each, strict=True):
        assert mc.generate(model, prompt, seed=seed, **settings).tokens == [new]
    same = mc.generate(model, [PROMPTS[0]] * 3, seed=1, **settings).tokens
    assert len({tuple(row) for row in same}) == 3, "rows of one seed have random numbers of their own"
    one_seed = mc.generate(model, [PROMPTS[0]] * 2, seed=np.array([5, 5]), **settings).tokens
    assert one_seed[0] == one_seed[1]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "frequency_penalty": 0.1}],
    ids=str,
)
def test_sampled_tokens_are_those_of_the_definition(model, reference, settings):
    """Of the float64 model, the float64 filters and the same random numbers, over more than a block of any backend."""
    sampling = Sampling(**settings)
    result = mc.generate(model, [PROMPTS[1], PROMPTS[2]], max_new_tokens=150, seed=9, **settings)
    uniform = Uniforms(9, 2)(0, 150)
    for row, prompt in enumerate(PROMPTS[1:]):
        out, new = reference(np.array([prompt])), []
        for step in range(150):
            logits = spec.adjusted(out.logits[0, -1, : CONFIG.vocab_size], sampling, prompt, new)
            new.append(spec.choose(spec.distribution(logits, sampling), uniform[step, row]))
            out = reference(np.array([new[-1:]]), out.state)
        assert result.tokens[row] == new


def test_several_continuations_of_each_prompt(model):
    settings = {"max_new_tokens": 9, "temperature": 1.5, "seed": [4, 5, 6]}
    result = mc.generate(model, PROMPTS, n=3, **settings)
    assert len(result.tokens) == 9
    assert result.tokens[::3] == mc.generate(model, PROMPTS, **settings).tokens
    assert len({tuple(row) for row in result.tokens}) == 9
    alone = mc.generate(model, PROMPTS[1], n=3, max_new_tokens=9, temperature=1.5, seed=5)
    assert_same(alone, result, slice(3, 6))
    greedy, once = mc.generate(model, PROMPTS, n=2, max_new_tokens=5), mc.generate(model, PROMPTS, max_new_tokens=5)
    for sample in range(2):
        assert_same(once, greedy, slice(sample, None, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name, own in configs().items() if architectures.traits(own).steps])
def test_a_prefill_gives_the_last_logits_and_the_state(backend, name, dtype):
    config = configs()[name]
    ids, mask = tokens(config, 3, 9), np.arange(9) >= np.array([[0], [4], [8]])
    values, noise = dict(initial_values(config)), np.random.default_rng(0)
    values |= {key: value + noise.normal(0, 0.3, value.shape) for key, value in values.items() if key.endswith("bias")}
    model = backend.build(config, values.items(), dtype=dtype)
    reference = ReferenceModel(config, {key: np.asarray(value) for key, value in backend.parameters(model).items()})
    state = reference_state = None
    # From the state of a first prompt, and without a mask.
    for columns, its_mask in ((slice(0, 9), mask), (slice(5, 9), mask[:, 8:].repeat(4, 1))):
        found = backend.prefill(model, ids[:, columns], its_mask, state)
        wanted = reference(ids[:, columns], reference_state, mask=its_mask)
        last = wanted.logits[:, -1, : config.vocab_size]
        assert_close(backend.to_numpy(found.logits), last, dtype, "value", f"{name} logits")
        assert_states(backend, config, found.state, wanted.state, name, dtype)
        state, reference_state = found.state, wanted.state


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefill_spares_the_last_block_s_gates(backend, name):
    """In float32: Mamba-1's block computes the last position's output only, where no other is asked for."""
    model = mc.build(CONFIGS[name], backend=backend.name)
    ids = backend.from_numpy(tokens(CONFIGS[name], 3, 9), device=model.device)
    with without_gradients(backend):
        hidden, _ = last_position(backend, model, ids, model.init_state(3))
    spares = backend.name != "torch" or model.kernels["selective_scan"] == "native"
    assert hidden.shape[1] == (1 if spares else 9)


def last_position(backend, model, ids, state):
    """The backbone's output where only that of the last position is asked for."""
    positions = importlib.import_module(f"mamba_core.backends.{backend.name}.positions")
    return model.backbone(ids, state, positions.call_of(None, None, length=ids.shape[1], last=True))


@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 100])
def test_a_prompt_in_chunks_gives_the_same_tokens(model, chunk):
    """Of 12, 7 and 1 tokens: chunks that end inside rows, between them and before them."""
    whole = mc.generate(model, PROMPTS, max_new_tokens=12)
    result = mc.generate(model, PROMPTS, max_new_tokens=12, prefill_chunk=chunk)
    assert_same(result, whole)


def test_no_new_tokens(model):
    result = mc.generate(model, PROMPTS, max_new_tokens=0, return_state=True)
    assert (result.tokens, result.logprobs, result.finish_reasons) == ([[], [], []], [[], [], []], ["length"] * 3)
    more = [[1], [2], [3]]
    wanted = mc.generate(model, [prompt + new for prompt, new in zip(PROMPTS, more, strict=True)], max_new_tokens=6)
    assert_same(mc.generate(model, more, max_new_tokens=6, state=result.state), wanted)


def test_an_empty_prompt_is_the_beginning_of_a_text(backend):
    values = dict(initial_values(CONFIG, 2))
    model = backend.build(dataclasses.replace(CONFIG, bos_token_id=4), values.items())
    result = mc.generate(model, [[], PROMPTS[0]], max_new_tokens=6)
    assert_same(result, mc.generate(model, [[4], PROMPTS[0]], max_new_tokens=6))


def test_turns_go_on_from_the_state(model):
    """Rows that end at different tokens: each turn is as if all before had been given again."""
    stop = mc.generate(model, PROMPTS, max_new_tokens=8).tokens[0][2]
    rows, state = [list(prompt) for prompt in PROMPTS], None
    given = PROMPTS
    for turn in range(3):
        wanted = mc.generate(model, rows, max_new_tokens=8, stop=stop)
        result = mc.generate(model, given, max_new_tokens=8, stop=stop, state=state, return_state=True)
        assert_same(result, wanted)
        assert result.finish_reasons == wanted.finish_reasons
        state = result.state
        given = [[1 + turn, 2], [turn], [3, 0, turn]]
        rows = [row + new + more for row, new, more in zip(rows, result.tokens, given, strict=True)]


def test_a_state_is_forked_into_many_continuations(model):
    """It is a value: what has gone on from it leaves it as it was."""
    state = mc.generate(model, PROMPTS[2], max_new_tokens=0, return_state=True).state
    more = [[1], [2, 3], [1]]
    for _ in range(2):
        result = mc.generate(model, more, max_new_tokens=6, state=state, n=2)
        wanted = mc.generate(model, [PROMPTS[2] + new for new in more], max_new_tokens=6)
        for sample in range(2):
            assert_same(wanted, result, slice(sample, None, 2))


def test_a_state_does_not_fit(model):
    state = mc.generate(model, PROMPTS[:2], max_new_tokens=0, return_state=True).state
    with pytest.raises(ValueError, match="another batch"):
        mc.generate(model, PROMPTS, state=state)
    with pytest.raises(TypeError, match="state is list"):
        mc.generate(model, PROMPTS, state=[1])
    with pytest.raises(ValueError, match="prompt 1 is empty; going on from a state takes at least one token"):
        mc.generate(model, [[1], []], state=state)
    result = mc.generate(model, [[1], []], state=state, max_new_tokens=0, return_state=True)
    wanted = mc.generate(model, [[*PROMPTS[0], 1, 2], [*PROMPTS[1], 2]], max_new_tokens=4)
    assert_same(mc.generate(model, [[2], [2]], state=result.state, max_new_tokens=4), wanted)


def test_a_saved_prompt_is_loaded_on_any_backend(backend, model, tmp_path):
    wanted = mc.generate(model, [[*PROMPTS[2], 1], [*PROMPTS[2], 2, 3]], max_new_tokens=10)
    state = mc.generate(model, PROMPTS[2], max_new_tokens=0, return_state=True).state
    mc.save_state(state, tmp_path / "prompt.safetensors", model)
    for name in installed():
        other = registry.get(name).build(CONFIG, initial_values(CONFIG, 2))
        loaded = mc.load_state(tmp_path / "prompt.safetensors", other)
        assert_same(mc.generate(other, [[1], [2, 3]], max_new_tokens=10, state=loaded), wanted)
