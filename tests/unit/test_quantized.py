"""Weights in 8 and 4 bits: how exact, and what such a model can and cannot do; their kernel is in `test_fused`."""

import numpy as np
import pytest
import torch

import mamba_core as mc
from mamba_core.backends.torch import quantize
from mamba_core.backends.torch.kernels.triton_linear import Packed
from mamba_core.backends.torch.quantization import GROUP, QuantizedLinear, pack, unpack
from mamba_core.spec.tolerances import relative_l2

CONFIG = mc.MambaConfig(d_model=256, n_layer=4, vocab_size=300)
# Relative L2 errors: of weights drawn from a normal distribution, and of the logits of the model above as it is
# initialised, where layers add theirs up. Measured 0.0053 and 0.085; 0.0090 and 0.153.
WEIGHTS = {8: 0.006, 4: 0.09}
LOGITS = {8: 0.012, 4: 0.2}


@pytest.fixture(scope="module")
def model():
    return mc.build(CONFIG, backend="torch", device="cpu")


def tokens(rows, length):
    return torch.from_numpy(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_weights(bits, dtype):
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(24, 512))).to(dtype)
    words, scales = pack(weight, bits)
    assert words.dtype == torch.int32
    assert words.nbytes * 8 == weight.numel() * bits
    back = unpack(Packed(words, scales, bits, GROUP), torch.float32)
    apart = relative_l2(back.numpy(), weight.double().numpy())
    assert WEIGHTS[bits] / 2 < apart < WEIGHTS[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_it_holds_come_back_exactly(bits):
    """All the whole numbers of a group, zeros, and a group whose largest is positive."""
    least = -(1 << (bits - 1))
    columns = 32 // bits * GROUP
    weight = torch.randint(least, -least, (3, columns)).float()
    weight[:, ::GROUP] = least
    weight[1] = 0
    weight[2] *= -0.25
    words, scales = pack(weight, bits)
    assert torch.equal(unpack(Packed(words, scales, bits, GROUP), torch.float32), weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_error_of_logits(model, bits):
    quantized = quantize(model, bits)
    given = tokens(2, 64)
    with torch.no_grad():
        apart = relative_l2(quantized(given).logits.numpy(), model(given).logits.numpy())
    assert LOGITS[bits] / 2 < apart < LOGITS[bits]


def test_it_decodes_as_it_computes(model):
    """Prefill and single positions are its own forward, and the model that it was made of is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = quantize(model)
    result = mc.generate(quantized, [[1, 2, 3]], max_new_tokens=6)
    with torch.no_grad():
        logits = quantized(torch.tensor([[1, 2, 3, *result.tokens[0]]])).logits[0, 2:-1, : CONFIG.vocab_size]
    assert logits.argmax(-1).tolist() == result.tokens[0]
    assert np.allclose(logits.log_softmax(-1).amax(-1).numpy(), result.logprobs[0], atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert quantized.backbone.embeddings.weight is model.backbone.embeddings.weight
    assert isinstance(quantized.backbone.layers[0].mixer.in_proj, QuantizedLinear)


def test_what_it_refuses(model, tmp_path):
    with pytest.raises(ValueError, match="bits is 5; expected 8 or 4"):
        quantize(model, 5)
    quantized = quantize(model)
    with pytest.raises(ValueError, match="the model is quantised"):
        mc.save(quantized, tmp_path / "model")
    with pytest.raises(TypeError, match=r"the head is \S*QuantizedLinear; expected torch\.nn\.Linear"):
        quantize(quantized)
    narrow = mc.build(mc.MambaConfig(d_model=40, n_layer=1, vocab_size=9), backend="torch", device="cpu")
    with pytest.raises(ValueError, match="has 40 columns; expected a multiple of 256 for 4 bits"):
        quantize(narrow, 4)
