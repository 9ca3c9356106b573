"""Hybrids of Mamba with attention and feed-forwards, as mamba_ssm has them: gradients, and decoding by mixed ways.

The laws of attention and feed-forwards stand in the cases of Jamba; here they are beside mixers that have fast ways.
"""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import tasks
from mamba_core.architectures.mamba import MambaConfig
from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

from .strategies import tokens

SMALL = {"d_model": 16, "vocab_size": 29, "d_state": 4, "initializer_range": 0.5, "tie_embeddings": False}
CONFIGS = {
    "mamba": MambaConfig(
        n_layer=2, attn_layer_idx=(1,), d_intermediate=100, attn_cfg={
            "causal": True, "num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "rotary_emb_dim": 4,
            "rotary_emb_interleaved": True, "qkv_proj_bias": False, "out_proj_bias": False,
        }, **SMALL,
    ),
    "mamba2": Mamba2Config(
        n_layer=3, headdim=8, attn_layer_idx=(1,), attn_cfg={
            "causal": True, "num_heads": 2, "d_conv": 3, "rotary_emb_dim": 6, "softmax_scale": 0.7,
        }, **SMALL,
    ),
}  # fmt: skip


def values_of(config):
    """Biases are drawn off zero, which would hide one that is not used."""
    noise, found = np.random.default_rng(0), dict(initial_values(config, 2))
    moved = {key: value + noise.normal(0, 0.3, value.shape) for key, value in found.items() if key.endswith("bias")}
    return {key: np.asarray(value, np.float32) for key, value in (found | moved).items()}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_gradients_equal_the_reference(backend, config):
    values = values_of(config)
    reference, ids = ReferenceModel(config, values), tokens(config, 3, 21)
    mask = np.arange(21) < np.array([21, 9, 4])[:, None]
    loss, gradients = backend.loss_and_gradients(backend.build(config, values.items()), ids, mask)
    logits = reference(ids[:, :-1], mask=mask[:, :-1]).logits
    wanted, dlogits = tasks.of(config).loss(config, logits, ids[:, 1:], mask[:, 1:])
    expected, _ = reference.vjp(dlogits, ids[:, :-1], mask=mask[:, :-1])
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert list(gradients) == list(expected)
    for key, value in expected.items():
        norm = np.linalg.norm(value)
        assert np.linalg.norm(gradients[key].astype(np.float64) - value) <= 1e-5 * max(norm, 1e-3), key


def test_decoding_equals_the_reference(backend, config):
    """Prompts of several lengths, read together, and their tokens one by one."""
    values = values_of(config)
    reference, model = ReferenceModel(config, values), backend.build(config, values.items())
    prompts = [tokens(config, 1, length, seed=length)[0].tolist() for length in (7, 2)]
    result = mc.generate(model, prompts, max_new_tokens=8)
    for prompt, new, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True):
        logits = reference(np.array([prompt + list(new)])).logits[0, len(prompt) - 1 : -1, : config.vocab_size]
        assert list(new) == logits.argmax(-1).tolist()
        found = logits - logits.max(-1, keepdims=True)
        found -= np.log(np.exp(found).sum(-1, keepdims=True))
        np.testing.assert_allclose(logprobs, found[range(8), new], rtol=1e-4, atol=1e-5)
