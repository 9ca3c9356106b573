"""What generation does on the host: random numbers, prompts, stops, whole characters, interrupts, memory, threads."""

import copy
import dataclasses
import gc
import pickle
import threading

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.generation import _Row
from mamba_core.registry import installed
from mamba_core.sampling import Sampling, Uniforms, philox
from mamba_core.tokenizer import ByteTokenizer, SubwordTokenizer

CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4, initializer_range=0.5, tie_embeddings=False)


@pytest.fixture(scope="module")
def model(backend):
    return mc.build(CONFIG, backend=backend.name)


# --- random numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_is_the_published_one(counter, key, words):
    """The known answers of Random123, the authors' own code."""
    found = philox([np.array([word], np.uint64) for word in counter], np.array([key], np.uint64))
    assert [int(word[0]) for word in found] == words


def test_uniforms_depend_on_seed_row_sample_and_step_alone():
    whole = Uniforms(7, 5)(0, 100)
    assert whole.dtype == np.float32
    assert whole.shape == (100, 5)
    assert 0 <= whole.min() < 0.01
    assert 0.99 < whole.max() < 1
    assert len(np.unique(whole)) == 500
    np.testing.assert_array_equal(Uniforms(7, 2)(30, 10), whole[30:40, :2])
    np.testing.assert_array_equal(Uniforms([7, 7, 9], 3)(0, 100)[:, :2], whole[:, [0, 0]])
    samples = Uniforms(7, 5, samples=3)(0, 100)
    np.testing.assert_array_equal(samples[:, ::3], whole)
    assert len(np.unique(samples)) == 1500


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "1", [1], [1, 2, 3], [1, -1], None])
def test_seeds_that_are_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed"):
        Uniforms(seed, 2)


@pytest.mark.parametrize(
    "settings",
    [{"processors": [3]}, {"processors": 3}, {"top_logprobs": -1}, {"top_logprobs": 1.0}, {"top_k": 2.0},
     {"presence_penalty": float("nan")}, {"frequency_penalty": "1"}],
    ids=str,
)  # fmt: skip
def test_settings_that_are_refused(settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize("bias", [[1], {"1": 1.0}, {256: 1.0}, {-1: 1.0}, {1: float("inf")}, {1: "x"}], ids=str)
def test_biases_that_are_refused(model, bias):
    with pytest.raises((TypeError, ValueError), match="logit_bias"):
        mc.generate(model, "x", logit_bias=bias)


# --- prompts -------------------------------------------------------------------------------------------------------


def framework_array(backend, value):
    if backend.name == "torch":
        import torch

        return torch.tensor(value)
    if backend.name == "mlx":
        import mlx.core as mx

        return mx.array(value)
    return backend.from_numpy(np.asarray(value))


def test_prompts_may_be_arrays(backend, model):
    rows = [[100, 101, 102], [32, 120, 61]]
    wanted = mc.generate(model, rows, max_new_tokens=4).tokens
    for kind in (np.asarray, lambda value: np.asarray(value, np.uint8), lambda value: framework_array(backend, value)):
        assert mc.generate(model, kind(rows), max_new_tokens=4).tokens == wanted
        assert mc.generate(model, kind(rows[0]), max_new_tokens=4).tokens == wanted[:1]
        assert mc.generate(model, [kind(row) for row in rows], max_new_tokens=4).tokens == wanted
        assert mc.generate(model, list(kind(rows[0])), max_new_tokens=4).tokens == wanted[:1]
        mask = kind([[0, 1, 1], [1, 1, 1]])
        for given in (mask, mask != 0):
            batch = {"input_ids": kind(rows), "attention_mask": given}
            assert (
                mc.generate(model, batch, max_new_tokens=4).tokens
                == mc.generate(model, [rows[0][1:], rows[1]], max_new_tokens=4).tokens
            )
    taken = mc.stream(model, framework_array(backend, rows[0]), max_new_tokens=4)
    list(taken)
    assert taken.result().tokens == wanted[:1]


def test_prompts_may_be_arrays_of_another_framework(model):
    for name in installed():
        ids = framework_array(mc.registry.get(name), [100, 101])
        assert mc.generate(model, ids, max_new_tokens=2).tokens == mc.generate(model, "de", max_new_tokens=2).tokens


def test_arrays_that_are_no_prompts(backend, model):
    for value, fault in (
        ([1.0, 2.0], r"prompts has an array of \S*float\d\d; expected integers"),
        ([True, False], r"prompts has an array of \S*bool; expected integers"),
        ([[[1]]], r"prompts is an array of shape \(1, 1, 1\); expected one or two axes"),
        (7, r"prompts is an array of shape \(\); expected one or two axes"),
    ):
        for array in (np.asarray(value), framework_array(backend, value)):
            with pytest.raises(TypeError, match=fault):
                mc.generate(model, array)
    for value, fault in (
        ([np.ones((1, 1), np.int32)], r"a prompt of a list has shape \(1, 1\)"),
        ([np.ones(1)], "expected integers"),
        ([[1.5]], "a token is 1.5"),
        ([{"role": "user", "content": "x"}], "a conversation is messages="),
        (3, "prompts is int"),
        (object(), "prompts is object"),
    ):
        with pytest.raises(TypeError, match=fault):
            mc.generate(model, value)


def test_embeddings_are_read_in_the_place_of_prompts(backend, model, monkeypatch):
    table = backend.parameters(model)["backbone.embeddings.weight"].astype(np.float32)
    given, real = [], backend.prefill
    monkeypatch.setattr(
        backend, "prefill", lambda model, tokens, *more: given.append(tokens) or real(model, tokens, *more)
    )
    rows = np.array([list(b"def main"), list(b"class A(")])
    read = mc.generate(model, rows[:, :-1], max_new_tokens=0, return_state=True).state
    settings = {"max_new_tokens": 5, "prefill_chunk": 3}
    wanted, embeds = mc.generate(model, rows, **settings), table[rows]
    given.clear()
    for array in (embeds, embeds.astype(np.float64), framework_array(backend, embeds)):
        found = mc.generate(model, inputs_embeds=array, **settings)
        assert (found.tokens, found.text) == (wanted.tokens, wanted.text)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=1e-4)
    assert [(each.shape[1], each.dtype.name) for each in given] == [(size, "float32") for size in (2, 3, 3)] * 3
    assert mc.generate(model, inputs_embeds=embeds[0], n=2, **settings).tokens == wanted.tokens[:1] * 2
    assert "".join(mc.stream(model, inputs_embeds=embeds[1], **settings)) == wanted.text[1]
    more = mc.generate(model, inputs_embeds=embeds[:, -1:], state=read, return_state=True, **settings)
    assert more.tokens == wanted.tokens
    again = mc.generate(model, ["x", "x"], state=more.state, **settings)
    whole = [[*row, *new, ord("x")] for row, new in zip(rows, more.tokens, strict=True)]
    assert again.tokens == mc.generate(model, whole, **settings).tokens
    # The penalty of a prompt that is known chooses another token than the likeliest, which stands in it.
    likeliest = mc.generate(model, rows[0], max_new_tokens=1).tokens[0]
    penalty = {"repetition_penalty": 1e9, "max_new_tokens": 1}
    row = next(
        [*rows[0][:at], *likeliest, *rows[0][at:]]
        for at in range(8)
        if mc.generate(model, [*rows[0][:at], *likeliest, *rows[0][at:]], max_new_tokens=1).tokens[0] == likeliest
    )
    assert mc.generate(model, row, **penalty).tokens[0] != likeliest
    assert mc.generate(model, inputs_embeds=table[row], **penalty).tokens[0] == likeliest


def test_embeddings_that_are_refused(model):
    for value, kind, fault in (
        (np.ones((2, 16), np.int32), TypeError, "inputs_embeds is int32; expected floats"),
        (np.ones(16, np.float32), TypeError, r"has shape \(16,\); expected \(l, d\) or \(b, l, d\)"),
        (np.ones((1, 1, 2, 16), np.float32), TypeError, "expected"),
        ([[1.0] * 16], TypeError, "inputs_embeds is list; expected an array"),
        (np.ones((2, 15), np.float32), ValueError, r"expected \(b, l, 16\)"),
        (np.ones((0, 16), np.float32), ValueError, "at least 1"),
        (np.ones((0, 2, 16), np.float32), ValueError, "at least 1"),
    ):
        with pytest.raises(kind, match=fault):
            mc.generate(model, inputs_embeds=value)


# --- what is wrapped, copied, or of another package ----------------------------------------------------------------


def test_wrapped_models_generate_and_are_explained(tmp_path):
    torch = pytest.importorskip("torch")
    model = mc.build(CONFIG, backend="torch")
    wrapped = torch.optim.swa_utils.AveragedModel(torch.optim.swa_utils.AveragedModel(model))
    wanted = mc.generate(model, "def ", max_new_tokens=4, return_state=True)
    assert mc.generate(wrapped, "def ", max_new_tokens=4).tokens == wanted.tokens
    assert "".join(mc.stream(wrapped, "def ", max_new_tokens=4)) == wanted.text[0]
    assert mc.explain(wrapped) == mc.explain(model)
    mc.save_state(wanted.state, tmp_path / "state.safetensors", wrapped)
    mc.load_state(tmp_path / "state.safetensors", wrapped)


def test_what_a_model_of_another_package_is_said_to_be():
    torch = pytest.importorskip("torch")
    foreign = type("Model", (torch.nn.Module,), {"__module__": "other_package.models"})()
    for call in (
        lambda: mc.generate(foreign, "x"),
        lambda: mc.stream(foreign, "x"),
        lambda: mc.save(foreign, "nowhere"),
        lambda: mc.explain(foreign),
    ):
        with pytest.raises(
            TypeError, match=r"model is other_package\.models\.Model; \w+ needs a model of this library"
        ):
            call()
    known = type("Model", (torch.nn.Module,), {"__module__": "transformers.models.mamba"})()
    with pytest.raises(TypeError, match=r"mamba\.Model, a model of transformers, which mamba_core\.load reads"):
        mc.generate(known, "x")
    with pytest.raises(TypeError, match="model is 'mamba-130m', a name; generating needs"):
        mc.generate("mamba-130m", "x")
    with pytest.raises(TypeError, match="source is Model; expected a checkpoint's name"):
        mc.parity(foreign)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_results_states_and_settings_are_copied(model, copied):
    result = mc.generate(model, "def ", max_new_tokens=4, top_logprobs=2, return_state=True)
    found = copied(result)
    state, found.state = found.state, None
    assert found == dataclasses.replace(result, state=None)
    for each in (state, copied(result.state)):
        wanted = mc.generate(model, "x", max_new_tokens=4, state=result.state)
        assert mc.generate(model, "x", max_new_tokens=4, state=each).logprobs == wanted.logprobs
    sampling = Sampling(temperature=0.5, top_k=3)
    assert copied(sampling) == sampling
    again = mc.generate(copied(model), "def ", max_new_tokens=4)
    assert (again.tokens, again.text) == (result.tokens, result.text)


# --- when a row ends, and its text ---------------------------------------------------------------------------------


def pieces(text: str, stop, limit: int = 1000, **config) -> tuple[list[str], "_Row"]:
    """What a stream would yield of a text that comes byte by byte, and the row."""
    row, sent, yielded = _Row(dataclasses.replace(CONFIG, **config), stop, ByteTokenizer(), limit), 0, []
    for byte in text.encode():
        row.add(byte, 0.0, None)
        piece, sent = row.since(sent)
        yielded += [piece] if piece else []
    return yielded, row


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("abcdef", "cd", "ab"),
        ("aabab!", ["bab", "ab"], "a"),
        ("one two", ["three", "two"], "one "),
        ("aaab", "aab", "a"),
        ("no stop", "stopping", None),
        ("é😀z", "😀", "é"),
        ("same", ["same"], ""),
        ("zxab", ["ab", "xab"], "z"),
    ],
)
def test_stop_texts(text, stop, wanted):
    """What is yielded never holds a stop text nor the beginning of the one that ends it."""
    yielded, row = pieces(text, stop)
    assert row.text == (text if wanted is None else wanted)
    assert row.finished == (None if wanted is None else "stop")
    assert row.text.startswith("".join(yielded))
    assert wanted is None or "".join(yielded) == wanted


def test_what_is_held_back_comes_when_the_row_ends():
    yielded, row = pieces("a stopp", "stopping", limit=7)
    assert (row.finished, row.text, yielded[-1]) == ("length", "a stopp", "stopp")


def test_a_stop_token_and_an_end_of_text_are_not_in_the_text():
    assert [(row.text, row.finished, row.tokens) for row in (
        pieces("abc", ord("b"))[1],
        pieces("abc", (), eos_token_id=ord("b"))[1],
    )] == [("a", "stop", [97, 98]), ("a", "eos", [97, 98])]  # fmt: skip


def test_streamed_pieces_are_whole_characters():
    yielded, _ = pieces("aé😀漢z", ())
    assert yielded == ["a", "é", "😀", "漢", "z"]
    row = _Row(CONFIG, (), ByteTokenizer(), 3)
    for byte in "😀".encode()[:3]:
        row.add(byte, 0.0, None)
    assert (row.text, row.finished) == ("\N{REPLACEMENT CHARACTER}", "length")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json whose tokens are bytes, with a token at the beginning of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {character: i for i, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return SubwordTokenizer(path)


def test_a_character_split_over_tokens(byte_level):
    decode, ids = byte_level.decoder(), byte_level.encode_more("a😀é")
    assert [decode(token) for token in ids] == ["a", "", "", "", "😀", "", "é"]
    assert decode(None) == ""
    decode = byte_level.decoder()
    assert [decode(token) for token in (*ids[:3], None)] == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]
    decode = byte_level.decoder()
    assert "".join(decode(token) for token in (9999, ids[2], *ids)) == "\N{REPLACEMENT CHARACTER}a😀é", (
        "not its own ids"
    )


def test_text_that_goes_on_has_no_beginning(byte_level):
    assert byte_level.encode("ab") == [256, *byte_level.encode_more("ab")]
    config = dataclasses.replace(CONFIG, vocab_size=257)
    model = mc.build(config, backend=installed()[0])
    first = mc.generate(model, "ab", max_new_tokens=0, tokenizer=byte_level, return_state=True)
    result = mc.generate(model, "cd", max_new_tokens=5, tokenizer=byte_level, state=first.state)
    wanted = mc.generate(model, "abcd", max_new_tokens=5, tokenizer=byte_level)
    assert result.tokens == wanted.tokens
    np.testing.assert_allclose(result.logprobs, wanted.logprobs, rtol=1e-4)


# --- streams, interrupts, threads ----------------------------------------------------------------------------------


def test_a_stream_is_the_text_and_has_the_result(model):
    wanted = mc.generate(model, "def ", max_new_tokens=20, return_state=True)
    taken = mc.stream(model, "def ", max_new_tokens=20)
    assert "".join(taken) == wanted.text[0]
    result = taken.result(return_state=True)
    assert (result.tokens, result.text, result.finish_reasons) == (wanted.tokens, wanted.text, ["length"])
    more = [mc.generate(model, "x", max_new_tokens=9, state=each.state).logprobs for each in (result, wanted)]
    assert more[0] == more[1]
    assert 0 < result.prompt_seconds < result.seconds


def test_a_stream_that_is_left_goes_on_from_what_there_is(model):
    taken = mc.stream(model, "def ", max_new_tokens=50)
    next(taken)
    next(taken)
    taken.close()
    assert list(taken) == []
    result = taken.result(return_state=True)
    assert result.finish_reasons == [None]
    assert 2 <= len(result.tokens[0]) < 50
    prompt = [*b"def ", *result.tokens[0], 7]
    wanted = mc.generate(model, prompt, max_new_tokens=6)
    found = mc.generate(model, [7], max_new_tokens=6, state=result.state)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=1e-4)


def test_a_processor_that_fails_leaves_the_model_as_it_was(model):
    wanted = mc.generate(model, "def ", max_new_tokens=6).tokens

    def fails(logits, context):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        mc.generate(model, "def ", max_new_tokens=6, processors=fails)
    assert mc.generate(model, "def ", max_new_tokens=6).tokens == wanted


def held(backend) -> int:
    """Bytes of the arrays that are alive."""
    gc.collect()
    if backend.name == "mlx":
        import mlx.core as mx

        mx.synchronize()
        return mx.get_active_memory()
    if backend.name == "jax":
        import jax

        return sum(array.nbytes for array in jax.live_arrays())
    import torch

    return sum(item.nbytes for item in gc.get_objects() if type(item) is torch.Tensor)


def test_a_stream_closed_early_frees_its_memory(backend, model):
    if backend.name not in ("torch", "mlx", "jax"):
        pytest.skip("nobody knows how to count its arrays")
    settings = {"max_new_tokens": 200, "temperature": 1.0, "presence_penalty": 0.1}
    list(mc.stream(model, "def ", **settings | {"max_new_tokens": 40}))
    before = held(backend)
    taken = mc.stream(model, "def ", **settings)
    for _ in range(3):
        next(taken)
    during = held(backend)
    taken.close()
    closed = held(backend)
    del taken
    assert held(backend) <= before < during
    # What it keeps, to have a result, is the state after the prompt.
    assert before <= closed < (before + during) / 2


def test_two_threads_on_one_model(model):
    settings = [{"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "top_p": 0.9, "seed": 2}, {}]
    alone = [mc.generate(model, ["def ", "x"], max_new_tokens=40, **each).tokens for each in settings]
    found, faults = {}, []

    def work(index):
        try:
            for turn in range(3):
                found[index, turn] = mc.generate(model, ["def ", "x"], max_new_tokens=40, **settings[index]).tokens
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert all(found[index, turn] == alone[index] for index in range(3) for turn in range(3))
