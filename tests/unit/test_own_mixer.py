"""A mixer of the user's in a model of ours, as mamba_core/README.md shows it, on each backend."""

import numpy as np
import pytest

import mamba_core as mc

CONFIG = mc.MambaConfig(d_model=8, n_layer=2, d_state=4, vocab_size=19)
IDS = np.random.default_rng(0).integers(0, 19, (2, 6)).astype(np.int32)


def torch_mixer(carries):
    torch = pytest.importorskip("torch")

    class Sums(torch.nn.Module):
        steps = carries

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((8,), 0.1))

        def forward(self, hidden, state, call):
            counted = hidden if call.mask is None else hidden * call.mask[..., None]
            before = state.conv[:, -1:, :8] if carries else 0
            sums = before + counted.cumsum(1)
            return sums * self.scale, state._replace(conv=torch.nn.functional.pad(sums[:, -1:], (0, 8, 2, 0)))

    return Sums()


def mlx_mixer(carries):
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")

    class Sums(nn.Module):
        steps = carries

        def __init__(self):
            super().__init__()
            self.scale = mx.full((8,), 0.1)

        def __call__(self, hidden, state, call):
            counted = hidden if call.mask is None else hidden * call.mask[..., None]
            before = state.conv[:, -1:, :8] if carries else 0
            sums = before + mx.cumsum(counted, axis=1)
            return sums * self.scale, state._replace(conv=mx.pad(sums[:, -1:], ((0, 0), (2, 0), (0, 8))))

    return Sums()


def jax_mixer(carries):
    jax, nnx = pytest.importorskip("jax"), pytest.importorskip("flax.nnx")

    class Sums(nnx.Module):
        steps = carries

        def __init__(self):
            self.scale = nnx.Param(jax.numpy.full((8,), 0.1))

        def __call__(self, hidden, state, call):
            counted = hidden if call.mask is None else hidden * call.mask[..., None]
            before = state.conv[:, -1:, :8] if carries else 0
            sums = before + jax.numpy.cumsum(counted, axis=1)
            return sums * self.scale, state._replace(conv=jax.numpy.pad(sums[:, -1:], ((0, 0), (2, 0), (0, 8))))

    return Sums()


MIXERS = {"torch": torch_mixer, "mlx": mlx_mixer, "jax": jax_mixer}


def built(name, carries=True):
    model = mc.build(CONFIG, backend=name, device="cpu")
    for block in model.backbone.layers:
        block.mixer = MIXERS[name](carries)
    return model


def expected(name, ids):
    """Logits of whole rows, in float64, of the blocks by hand."""
    backend = mc.registry.get(name)
    plain = mc.build(CONFIG, backend=name, device="cpu")
    weights = {key: np.asarray(value, np.float64) for key, value in backend.parameters(plain).items()}
    hidden = weights["backbone.embeddings.weight"][ids]
    for layer in range(CONFIG.n_layer):
        hidden = hidden + 0.1 * normed(hidden, weights[f"backbone.layers.{layer}.norm.weight"]).cumsum(1)
    return normed(hidden, weights["backbone.norm_f.weight"]) @ weights["backbone.embeddings.weight"].T


def normed(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight


@pytest.fixture(params=MIXERS)
def name(request):
    if request.param not in mc.available_backends():
        pytest.skip(f"{request.param} is not installed")
    return request.param


def test_it_is_called_in_whole_sequences_and_from_a_state(name):
    backend, model, whole = mc.registry.get(name), built(name), expected(name, IDS)
    out = backend.infer(model, IDS[:, :4])
    rest = backend.infer(model, IDS[:, 4:], out.state)
    found = np.concatenate([backend.to_numpy(out.logits), backend.to_numpy(rest.logits)], 1)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_it_generates_what_whole_sequences_give(name):
    row, prompt = IDS[0].tolist(), len(IDS[0])
    for _ in range(4):
        row.append(int(expected(name, np.array([row]))[0, -1, : CONFIG.vocab_size].argmax()))
    assert mc.generate(built(name), IDS[:1], max_new_tokens=4).tokens == [row[prompt:]]


def test_one_that_does_not_say_that_it_steps_generates_nothing(name):
    with pytest.raises(ValueError, match="the mixer of layer 0, Sums, does not say that it does; give Sums"):
        mc.generate(built(name, carries=False), IDS, max_new_tokens=1)


def test_it_is_trained(name):
    model, data = built(name, carries=False), np.tile(np.arange(5), 40)
    settings = mc.TrainSettings(steps=8, batch_size=2, length=8, learning_rate=0.02, warmup_steps=1)
    before = np.asarray(mc.registry.get(name).to_numpy(scale_of(model)))
    history = mc.train(model, data, settings)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert np.abs(np.asarray(mc.registry.get(name).to_numpy(scale_of(model))) - before).min() > 1e-4


def scale_of(model):
    scale = model.backbone.layers[0].mixer.scale
    return scale[...] if model.backend == "jax" else scale
