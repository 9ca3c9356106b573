"""Other packages' names over ours, against those packages where they are right, and what they cannot say."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
mambapy_mamba = pytest.importorskip("mambapy.mamba")
minimamba = pytest.importorskip("minimamba")

from mambapy import jamba as mambapy_jamba  # noqa: E402
from mambapy import vim as mambapy_vim  # noqa: E402

import mamba_core as mc  # noqa: E402
from mamba_core.compat import minimamba as ours  # noqa: E402
from mamba_core.compat.mambapy import jamba, lm, mamba, mamba2, vim  # noqa: E402

MINI = {"d_model": 16, "n_layer": 2, "d_state": 4}
SMALL = {"d_model": 16, "n_layers": 2, "d_state": 4}
HYBRID = {
    "d_model": 16, "n_layers": 4, "mlp_size": 12, "d_state": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 4, "vocab_size": 50, "attn_layer_offset": 1, "attn_layer_period": 2,
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


class Characters:
    """A tokenizer whose ids are those of characters."""

    def __call__(self, text, return_tensors=None):
        return types.SimpleNamespace(input_ids=torch.tensor([[ord(character) % 32 for character in text]]))

    def decode(self, ids, **options):
        return "".join(chr(64 + number) for number in ids)


@pytest.fixture(scope="module", autouse=True)
def the_same_values():
    """Of both packages' initial values, in every run."""
    torch.manual_seed(0)


def carried(theirs, module):
    """Both in evaluation form, with the weights of the first."""
    tensors = theirs.state_dict()
    module.load_state_dict(tensors)
    assert module.state_dict().keys() == tensors.keys()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in tensors.items())
    return theirs.eval(), module.eval()


def ids(rows=2, length=9, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 30, (rows, length)))


def embeddings():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32))


def close(found, expected):
    torch.testing.assert_close(found, expected, **CLOSE)


# --- MiniMamba -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal():
    given = {**MINI, "vocab_size": 30}
    return carried(
        minimamba.MambaForCausalLM(minimamba.MambaLMConfig(**given)), ours.MambaForCausalLM(ours.MambaLMConfig(**given))
    )


def test_a_language_model_of_minimamba(causal):
    theirs, model = causal
    close(model(ids()), theirs(ids()))
    labels = ids().where(ids() > 5, -100)
    found, expected = model(ids(), labels=labels), theirs(ids(), labels=labels)
    close(found["loss"], expected["loss"])
    assert found["logits"].shape == (2, 9, 32)


def test_a_cache_of_minimamba_goes_on(causal):
    """Without an offset too, as its README calls it; there MiniMamba begins anew, and at one position it fails."""
    theirs, model = causal
    cache, its = ours.InferenceParams(), minimamba.InferenceParams()
    whole = model(ids())
    parts = [model(ids()[:, :4], cache), model(ids()[:, 4:8], cache), model(ids()[:, 8:], cache)]
    close(torch.cat(parts, 1), whole)
    assert not cache.cache["state"][1].layers[0].ssm.requires_grad
    info = model.get_cache_info(cache)
    state = cache.cache["state"][1]
    assert info == cache.get_cache_info()
    assert info["memory_mb"] * 2**20 == mc.state_info(model.core, state).bytes > 0
    assert (info["cached_layers"], info["total_tensors"]) == (2, 4)
    model.reset_cache(cache)
    assert cache.cache == {}
    assert model.get_cache_info(cache)["memory_mb"] == 0
    theirs(ids()[:, :4], its)
    assert (theirs(ids()[:, 4:8], its) - whole[:, 4:8]).abs().max() > 1e-4
    with pytest.raises(AttributeError, match="roll_"):
        theirs(ids()[:, 8:], its)


def test_a_cache_of_the_users_own_class(causal):
    """As MiniMamba 0.2 has users write one."""
    model = causal[1]
    cache = types.SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    for position in range(3):
        logits = model(ids()[:, position : position + 1], inference_params=cache)
        cache.seqlen_offset += 1
    close(logits[:, 0], model(ids())[:, 2])
    with pytest.raises(ValueError, match="2 positions are given with seqlen_offset=3"):
        model(ids()[:, :2], cache)
    with pytest.raises(TypeError, match="inference_params is int"):
        model(ids(), 3)
    # Another batch begins anew, as in MiniMamba.
    cache.seqlen_offset = 0
    close(model(ids(3), cache), model(ids(3)))
    other = ours.MambaForCausalLM(ours.MambaLMConfig(**MINI, vocab_size=30))
    with pytest.raises(ValueError, match="the state of another model"):
        other(ids()[:, :1], cache)


def test_generation_of_minimamba(causal):
    model, prompt = causal[1], ids(2, 4)
    greedy = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert greedy.shape == (2, 9)
    assert torch.equal(greedy[:, :4], prompt)
    assert torch.equal(greedy[:, 4], model(prompt)[:, -1, :30].argmax(-1))
    torch.manual_seed(3)
    drawn = model.generate(prompt, max_length=12, top_k=20, use_cache=False)
    torch.manual_seed(3)
    assert torch.equal(drawn, model.generate(prompt, max_length=12, top_k=20))
    assert not torch.equal(drawn, model.generate(prompt, max_length=12, top_k=20))
    end = int(greedy[0, 4])
    ended = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert ended[0, 4] == end
    assert not ended[0, 5:].any()
    torch.manual_seed(3)
    streamed = list(model.generate_streaming(prompt[:1], max_new_tokens=6))
    assert len(streamed) == 6
    with pytest.raises(ValueError, match="input_ids has 2 rows"):
        list(model.generate_streaming(prompt))
    with pytest.raises(ValueError, match="temperature is 0"):
        model.generate(prompt, temperature=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_a_classifier_of_minimamba(pooling):
    given = {**MINI, "num_labels": 3, "pooling_strategy": pooling}
    theirs, model = carried(
        minimamba.MambaForSequenceClassification(minimamba.MambaClassificationConfig(**given)),
        ours.MambaForSequenceClassification(ours.MambaClassificationConfig(**given)),
    )
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    close(model(ids(), mask), theirs(ids(), mask))
    found = model(ids(), labels=torch.tensor([0, 2]))
    close(found["loss"], theirs(ids(), labels=torch.tensor([0, 2]))["loss"])
    # Padded on the left too, where MiniMamba reads another position and its scan has seen the padding.
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids()[:1, :6]], 1)
    left = (torch.arange(9) >= 3)[None]
    close(model(padded, left), model(ids()[:1, :6]))
    assert (theirs(padded, left) - theirs(ids()[:1, :6])).abs().max() > 1e-4


def test_dropout_of_the_classifier_acts_in_training():
    def model(rate):
        torch.manual_seed(0)
        return ours.MambaForSequenceClassification(ours.MambaClassificationConfig(**MINI, dropout=rate))

    dropped, kept = model(0.5), model(0.0)
    assert not torch.equal(dropped(ids()), dropped(ids()))
    assert torch.equal(kept(ids()), kept(ids()))
    assert torch.equal(dropped.eval()(ids()), kept(ids()))


def test_features_of_minimamba():
    theirs, model = carried(
        minimamba.MambaForFeatureExtraction(minimamba.BaseMambaConfig(**MINI)),
        ours.MambaForFeatureExtraction(ours.BaseMambaConfig(**MINI)),
    )
    close(model(embeddings()), theirs(embeddings()))
    given = {**MINI, "vocab_size": 30}
    theirs, model = carried(
        minimamba.MambaForFeatureExtraction(minimamba.MambaLMConfig(**given)),
        ours.MambaForFeatureExtraction(ours.MambaLMConfig(**given)),
    )
    close(model(ids()), theirs(ids()))
    cache = ours.InferenceParams()
    close(torch.cat([model(ids()[:, :5], cache), model(ids()[:, 5:], cache)], 1), model(ids()))
    close(model(embeddings()), theirs(embeddings()))


class Halved(torch.nn.Module):
    """A mixer of a user's."""

    def __init__(self, config):
        super().__init__()
        self.scale, self.layer_idx = torch.nn.Parameter(torch.full((config.d_model,), 0.5)), None

    def forward(self, hidden_states, inference_params=None):
        return hidden_states.cumsum(1) * self.scale + self.layer_idx


def test_an_encoder_with_a_mixer_of_the_users():
    theirs, encoder = carried(
        minimamba.MambaEncoder(minimamba.BaseMambaConfig(**MINI), Halved),
        ours.MambaEncoder(ours.BaseMambaConfig(**MINI), Halved),
    )
    close(encoder(embeddings()), theirs(embeddings()))
    encoder(embeddings()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_config_of_minimamba_is_kept(tmp_path):
    config = ours.MambaLMConfig(**MINI, vocab_size=30)
    assert config.padded_vocab_size == 32
    config.save_to_json(tmp_path / "config.json")
    assert ours.MambaLMConfig.from_json(tmp_path / "config.json") == config
    assert ours.MambaConfig.from_dict(config.to_dict()) == config


# --- mambapy -------------------------------------------------------------------------------------


def test_blocks_and_steps_of_mambapy():
    theirs, model = carried(
        mambapy_mamba.Mamba(mambapy_mamba.MambaConfig(**SMALL)), mamba.Mamba(mamba.MambaConfig(**SMALL))
    )
    x = embeddings()
    close(model(x), theirs(x))
    caches, its = ([(None, torch.zeros(2, 32, 3)) for _ in range(2)] for _ in range(2))
    for position in range(4):
        y, caches = model.step(x[:, position], caches)
        expected, its = theirs.step(x[:, position], its)
        close(y, expected)
        close(caches, its)
    with pytest.raises(ValueError, match="1 caches are given; expected one for each of 2 layers"):
        model.step(x[:, 0], caches[:1])


def test_a_language_model_of_mambapy():
    torch.manual_seed(0)
    model = lm.LM(mamba.MambaConfig(**SMALL), vocab_size=33, pad_vocab_size_multiple=8)
    assert model(ids()).shape == (2, 9, 40)
    caches = [(None, torch.zeros(2, 32, 3)) for _ in range(2)]
    for position in range(3):
        logits, caches = model.step(ids()[:, position], caches)
    close(logits, model(ids())[:, 2])
    given = ids()
    given[:, 1] = 0
    model(given).square().mean().backward()
    embedding = dict(model.named_parameters())["core.backbone.embeddings.weight"]
    assert not embedding.grad[0].any()
    assert embedding.grad[int(given[0, 0])].any()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {value.ndim for value in others["params"]} == {1}
    assert min(value.ndim for value in decayed["params"]) == 2
    assert model.generate(Characters(), "hello", num_tokens=4).startswith(Characters().decode([8, 5, 12, 12, 15]))
    assert len(model.generate(Characters(), "hello", num_tokens=4, batch_size=3)) == 3


def test_mamba2_needs_no_gpu():
    model = lm.LM(mamba2.Mamba2Config(**{**SMALL, "d_head": 8}), vocab_size=33)
    assert model(ids()).shape == (2, 9, 33)
    with pytest.raises(NotImplementedError, match="no cache of Mamba-2"):
        mamba2.Mamba2(mamba2.Mamba2Config(**SMALL, d_head=8)).step(None, [])


def test_jamba_of_mambapy():
    theirs, model = carried(
        mambapy_jamba.JambaLM(mambapy_jamba.JambaLMConfig(**HYBRID)), jamba.JambaLM(jamba.JambaLMConfig(**HYBRID))
    )
    (found, routers), (expected, its_routers) = model(ids()), theirs(ids())
    close(found, expected)
    close(routers, its_routers)
    assert jamba.load_balancing_loss(routers, 4, 2) >= 1
    caches = [layer.get_empty_cache(2, "cpu") for layer in model.layers]
    its = [layer.get_empty_cache(2, "cpu") for layer in theirs.jamba.layers]
    for position in range(3):
        here = ids()[:, position : position + 1]
        y, caches = model.step(here, caches)
        close(y, theirs.step(here, its)[0])
        close(caches, its)
    # Several rows, which end mambapy's loop with an error.
    assert len(model.generate(Characters(), "hello", max_tokens=3, batch_size=2)) == 2
    with pytest.raises((RuntimeError, ValueError)):
        theirs.generate(Characters(), "hello", max_tokens=3, batch_size=2)


def test_the_core_of_jamba():
    given = {**HYBRID, "num_experts": 1}
    theirs, model = carried(
        mambapy_jamba.Jamba(mambapy_jamba.JambaLMConfig(**given)), jamba.Jamba(jamba.JambaLMConfig(**given))
    )
    close(model(embeddings()), theirs(embeddings()))
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        jamba.JambaLM(jamba.JambaLMConfig(**HYBRID, attention_dropout=0.1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_vim_of_mambapy(bidirectional):
    given = {**SMALL, "bidirectional": bidirectional}
    theirs, model = carried(mambapy_vim.VMamba(mambapy_vim.MambaConfig(**given)), vim.VMamba(vim.MambaConfig(**given)))
    close(model(embeddings()), theirs(embeddings()))
    caches = [(None, torch.zeros(2, 32, 3)) for _ in range(2)]
    if not bidirectional:
        close(model.step(embeddings()[:, 0], caches)[0], model(embeddings())[:, 0])
    else:
        with pytest.raises(NotImplementedError, match="a reversed direction sees what comes later"):
            model.step(embeddings()[:, 0], caches)


# --- both ----------------------------------------------------------------------------------------

REFUSED = {
    "mup": lambda: mamba.Mamba(mamba.MambaConfig(**SMALL, mup=True)),
    "inner_layernorms": lambda: mamba.Mamba(mamba.MambaConfig(**SMALL, inner_layernorms=True)),
    "learnable_init_states": lambda: mamba2.Mamba2(mamba2.Mamba2Config(**SMALL, d_head=8, learnable_init_states=True)),
    "rms_norm": lambda: ours.MambaForCausalLM(ours.MambaLMConfig(**MINI, rms_norm=False)),
    "pooling_strategy|pooling": lambda: ours.MambaForSequenceClassification(
        ours.MambaClassificationConfig(**MINI, pooling_strategy="sum")
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_ours_cannot_be_is_refused_by_name(field):
    with pytest.raises(ValueError, match=field):
        REFUSED[field]()


def test_a_name_that_is_not_there_says_what_to_take():
    with pytest.raises(ImportError, match=r"mambapy\.mamba has no MambaBlock: .*take Mamba"):
        from mamba_core.compat.mambapy.mamba import MambaBlock  # noqa: F401
    with pytest.raises(ImportError, match=r"minimamba has no S6: .*MambaEncoder"):
        from mamba_core.compat.minimamba import S6  # noqa: F401
    with pytest.raises(AttributeError, match="nonsense"):
        ours.nonsense  # noqa: B018


def test_a_tensor_that_does_not_fit_is_named():
    model = ours.MambaForCausalLM(ours.MambaLMConfig(**MINI, vocab_size=30))
    tensors = model.state_dict()
    changed = tensors | {"lm_head.lm_head.weight": tensors["lm_head.lm_head.weight"] + 1}
    with pytest.raises(RuntimeError, match=r"lm_head\.lm_head\.weight differs from embedding"):
        model.load_state_dict(changed)
    with pytest.raises(RuntimeError, match="nonsense"):
        model.load_state_dict(tensors | {"nonsense": torch.zeros(1)})
    hybrid = jamba.JambaLM(jamba.JambaLMConfig(**HYBRID))
    tensors = dict(hybrid.state_dict())
    del tensors["jamba.layers.1.moe.experts.2.gate_proj.weight"]
    with pytest.raises(RuntimeError, match=r"experts\.2\.gate_proj\.weight is missing"):
        hybrid.load_state_dict(tensors)


def test_pretrained_weights(tmp_path):
    model = mc.build(mc.MambaConfig(d_model=16, n_layer=2, vocab_size=33), backend="torch", device="cpu")
    mc.save(model, tmp_path / "lm", layout="mamba_ssm")
    loaded = lm.from_pretrained(str(tmp_path / "lm")).eval()
    close(loaded(ids()), model(ids()).logits)
    with pytest.raises(ValueError, match="expected a language model of jamba"):
        jamba.from_pretrained(str(tmp_path / "lm"))
    small = mc.JambaConfig(d_model=16, n_layer=2, num_heads=4, num_kv_heads=2, d_intermediate=12, vocab_size=33)
    hybrid = mc.build(small, backend="torch", device="cpu")
    mc.save(hybrid, tmp_path / "jamba")
    close(jamba.from_pretrained(str(tmp_path / "jamba"))(ids())[0], hybrid(ids()).logits)
    with pytest.raises(ValueError, match="expected a language model of mamba or mamba2"):
        lm.from_pretrained(str(tmp_path / "jamba"))
