"""Blocks of long sequences on a CPU, computed a piece of the positions after the other."""

import dataclasses
import importlib

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.kernels import Kernels
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.tasks.lm import cross_entropy

FIELDS = {"d_model": 16, "n_layer": 2, "vocab_size": 29, "initializer_range": 0.1}
CONFIG = mc.MambaConfig(**FIELDS)
PLACES = dict.fromkeys(("torch", "jax", "mlx"), "stack")
# Pieces have 64 positions here: two of them, and a rest.
LENGTH = 150


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    """The module that cuts, with short pieces, and which keeps in `pieces` the lengths that a block was given."""
    if missing := registry.missing_packages(request.param):
        pytest.skip(f"{', '.join(missing)} not installed")
    if request.param == "mlx" and (why := library.missing()):
        pytest.skip(f"what MLX computes lazily is not cut, and there is no native library: {why}")
    place = importlib.import_module(f"mamba_core.backends.{request.param}.{PLACES[request.param]}")
    monkeypatch.setattr(place, "PIECE_BYTES", 1)
    monkeypatch.setattr(place, "FEWEST", 64)
    place.pieces = []
    owner, names = place, ("_called", "_recomputed")
    if request.param == "mlx":
        owner, names = importlib.import_module("mamba_core.backends.mlx.blocks").Block, ("__call__",)
    for name in names:
        run = getattr(owner, name)

        def watched(block, residual, *arguments, run=run):
            place.pieces.append(residual.shape[1])
            return run(block, residual, *arguments)

        monkeypatch.setattr(owner, name, watched)
        if request.param == "mlx":  # where a patched block would not be cut
            written = importlib.import_module("mamba_core.backends.mlx.untouched")._WRITTEN
            monkeypatch.setitem(written, (owner, name), watched)
    yield place
    del place.pieces


def backend_of(place):
    return registry.get(place.__name__.split(".")[2])


def built(place, config=CONFIG, remat=False, **settings):
    """The model, and the reference with the same values."""
    values = dict(initial_values(config, 5))
    backend = backend_of(place)
    model = backend.build(config, values.items(), device="cpu", **settings)
    model.remat = remat
    return model, ReferenceModel(config, {name: value.astype(np.float64) for name, value in values.items()})


def tokens(length=LENGTH, batch=2):
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)


def called(place, model, ids, *arguments, observe=None, **positions):
    """The output of a call of which no gradient is wanted."""
    backend = backend_of(place)
    ids = backend.from_numpy(ids, device="cpu")
    positions = {name: backend.from_numpy(value, device="cpu") for name, value in positions.items()}
    if backend.name != "torch":
        return model(ids, *arguments, observe=observe, **positions)
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        return model(ids, *arguments, observe=observe, **positions)


def assert_same(place, output, expected, dtype="float32"):
    to_numpy = backend_of(place).to_numpy
    assert relative_l2(to_numpy(output.logits), expected.logits) <= tolerance(dtype)
    for layer, other in zip(output.state.layers, expected.state.layers, strict=True):
        assert relative_l2(to_numpy(layer.conv), other.conv) <= tolerance(dtype)
        assert relative_l2(to_numpy(layer.ssm), other.ssm) <= tolerance(dtype)


@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig])
@pytest.mark.parametrize("length", [128, LENGTH])
def test_a_long_sequence_is_computed_in_pieces(place, length, kind):
    model, reference = built(place, kind(**FIELDS))
    output, expected = called(place, model, tokens(length)), reference(tokens(length))
    assert_same(place, output, expected)
    assert set(place.pieces) == {64, *({length % 64} if length % 64 else ())}
    assert_same(place, called(place, model, tokens(70), output.state), reference(tokens(70), expected.state))


def test_a_short_one_is_not(place):
    model, reference = built(place)
    assert_same(place, called(place, model, tokens(64)), reference(tokens(64)))
    assert set(place.pieces) == {64}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients(place, padded, remat):
    """In pieces where a block is computed again, whole where what it computed is kept, and where there is padding."""
    model, reference = built(place, remat=remat)
    backend, ids = backend_of(place), tokens(LENGTH + 1)
    mask = np.arange(LENGTH + 1) >= np.array([[0], [70]]) if padded else None
    loss, gradients = backend.loss_and_gradients(model, ids, mask)
    if backend.name == "torch":
        assert set(place.pieces) == ({64, LENGTH % 64} if remat and not padded else {LENGTH})
    before, after = (None, None) if mask is None else (mask[:, :-1], mask[:, 1:])
    logits = reference(ids[:, :-1], mask=before).logits
    expected_loss, dlogits = cross_entropy(logits, ids[:, 1:], after)
    expected, _ = reference.vjp(dlogits, ids[:, :-1], mask=before)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name, gradient in gradients.items():
        assert relative_l2(gradient, expected[name]) <= tolerance("float32", "gradient"), name


@pytest.mark.parametrize("positions", ["mask", "segment_ids"])
def test_padded_and_packed_ones_are_too_on_torch(place, positions):
    model, reference = built(place)
    ids = tokens()
    given = {positions: np.arange(LENGTH)[None] >= np.array([[3], [70]])}
    given = {name: value if name == "mask" else value.astype(np.int32) for name, value in given.items()}
    assert_same(place, called(place, model, ids, **given), reference(ids, **given))
    assert set(place.pieces) == ({64, LENGTH % 64} if backend_of(place).name == "torch" else {LENGTH})


def test_an_observer_sees_the_whole(place):
    model, _ = built(place)
    seen = {}
    called(place, model, tokens(), observe=seen.__setitem__)
    assert seen["layers.1.residual"].shape == (2, LENGTH, CONFIG.d_model)


def test_half_precision(place):
    model, _ = built(place, dtype="bfloat16")
    whole, _ = built(place)
    output = called(place, model, tokens())
    to_numpy = backend_of(place).to_numpy
    expected = to_numpy(called(place, whole, tokens()).logits)
    assert relative_l2(to_numpy(output.logits), expected) <= tolerance("bfloat16")


# --- what must not be cut ------------------------------------------------------------------------


def leaning(place, inner):
    """A module that calls another, and takes the mean over the sequence from what that returns."""
    package = {"torch": "torch.nn", "jax": "flax.nnx", "mlx": "mlx.nn"}[backend_of(place).name]
    kind = importlib.import_module(package).Module

    class Leaning(kind):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def __call__(self, *arguments):
            y = self.inner(*arguments)
            return y - y.mean(1, keepdims=True)

    return Leaning()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("path", ["norm", "mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"])
def test_what_looks_along_the_sequence_sees_the_whole(place, path, remat, monkeypatch):
    if path == "mixer.dt_proj" and backend_of(place).name != "mlx":
        pytest.skip("its weights are read")
    model, _ = built(place, remat=remat)
    owner = model.backbone.layers[1]
    *owners, name = path.split(".")
    for attribute in owners:
        owner = getattr(owner, attribute)
    setattr(owner, name, leaning(place, getattr(owner, name)))
    assert_same_in_pieces_and_whole(place, model, monkeypatch)
    assert (64 in place.pieces) == (backend_of(place).name != "torch"), "the other block is cut"


@pytest.mark.parametrize("name", ["embeddings", "norm_f"])
def test_so_does_what_is_around_the_blocks(place, name, monkeypatch):
    model, _ = built(place, dataclasses.replace(CONFIG, tie_embeddings=False))
    setattr(model.backbone, name, leaning(place, getattr(model.backbone, name)))
    assert_same_in_pieces_and_whole(place, model, monkeypatch)


@pytest.mark.parametrize("place", ["jax", "mlx"], indirect=True)
def test_so_does_a_feed_forward(place, monkeypatch):
    model, _ = built(place)
    package = "flax.nnx" if place.__name__.split(".")[2] == "jax" else "mlx.nn"
    block, modules = model.backbone.layers[1], importlib.import_module(package)

    class Mean(modules.Module):
        def __call__(self, hidden, call):
            return hidden.mean(1, keepdims=True) + hidden

    wrap = getattr(modules, "data", lambda module: module)
    block.norm2, block.feed_forward = wrap(model.backbone.layers[0].norm), wrap(Mean())
    assert_same_in_pieces_and_whole(place, model, monkeypatch)


@pytest.mark.parametrize("place", ["torch"], indirect=True)
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "out_proj"])
def test_so_does_a_patched_layer_of_torch(place, name, monkeypatch):
    model, _ = built(place)
    layer = getattr(model.backbone.layers[1].mixer, name)
    layer.forward = lambda x, forward=layer.forward: forward(x - x.mean(1, keepdim=True))
    assert_same_in_pieces_and_whole(place, model, monkeypatch)


@pytest.mark.parametrize("path", ["layers.1.mixer.out_proj", "norm_f"])
def test_a_prompt_s_last_position_is_what_the_whole_gives(place, path):
    """A prefill computes the last position alone only where nothing looks along the sequence."""
    model, _ = built(place)
    owner = model.backbone
    *owners, name = path.split(".")
    for attribute in owners:
        owner = owner[int(attribute)] if attribute.isdecimal() else getattr(owner, attribute)
    setattr(owner, name, leaning(place, getattr(owner, name)))
    backend, ids = backend_of(place), tokens(64)
    whole = backend.to_numpy(called(place, model, ids).logits)[:, -1]
    last = backend.to_numpy(backend.prefill(model, ids, np.ones(ids.shape, bool)).logits)
    assert relative_l2(last, whole[:, : last.shape[-1]]) <= tolerance("float32")


def differentiated(place, model, ids):
    """The mean square of the logits, computed for a gradient."""
    backend, loss = backend_of(place), lambda model: (model(ids).logits ** 2).mean()
    ids = backend.from_numpy(ids, device="cpu")
    if backend.name == "torch":
        value = loss(model)
        value.backward()
        return value.item()
    if backend.name == "jax":
        return float(importlib.import_module("flax.nnx").value_and_grad(loss)(model)[0])
    return importlib.import_module("mlx.nn").value_and_grad(model, loss)(model)[0].item()


def assert_same_in_pieces_and_whole(place, model, monkeypatch):
    """Of a call, and of a gradient's loss."""
    backend, found = backend_of(place), []
    for fewest in (10**6, 64):
        place.pieces.clear()
        monkeypatch.setattr(place, "FEWEST", fewest)
        logits = backend.to_numpy(called(place, model, tokens()).logits)
        found.append((logits, differentiated(place, model, tokens()) if model.remat else 0.0))
    assert relative_l2(found[0][0], found[1][0]) <= tolerance("float32")
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("place", ["torch"], indirect=True)
def test_hooks_of_torch_see_the_whole(place):
    model, _ = built(place)
    seen = []
    handle = model.backbone.layers[1].mixer.in_proj.register_forward_hook(
        lambda *given: seen.append(given[-1].shape[1])
    )
    called(place, model, tokens())
    handle.remove()
    assert seen == [LENGTH]


@pytest.mark.parametrize("place", ["torch"], indirect=True)
def test_a_graph_of_torch_is_of_any_length(place):
    torch = importlib.import_module("torch")
    model, reference = built(place)
    ids = torch.from_numpy(tokens()).long()
    length = torch.export.Dim("length", min=2, max=1000)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), dynamic_shapes=({1: length},)).module()
        for other in (tokens(), tokens(80)):
            assert_same(place, exported(torch.from_numpy(other).long()), reference(other))


@pytest.mark.parametrize("place", ["jax"], indirect=True)
def test_a_program_of_jax_is_of_any_length(place):
    jax = importlib.import_module("jax")
    model, reference = built(place, kernels="sequential")
    ids = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, l"), "int32")
    exported = jax.export.export(jax.jit(lambda ids: model(ids).logits))(ids)
    for other in (tokens(), tokens(80)):
        assert relative_l2(np.asarray(exported.call(other)), reference(other).logits) <= tolerance("float32")


@pytest.mark.parametrize("place", ["jax"], indirect=True)
def test_a_block_of_jax_that_counts_is_called_once(place):
    nnx = importlib.import_module("flax.nnx")
    model, _ = built(place)
    for block in model.backbone.layers:
        block.calls = nnx.Variable(np.zeros(()))
    called(place, model, tokens())
    assert set(place.pieces) == {LENGTH}


@pytest.mark.parametrize("place", ["jax"], indirect=True)
def test_vmap_and_jit_of_jax(place):
    jax = importlib.import_module("jax")
    nnx = importlib.import_module("flax.nnx")
    model, reference = built(place)
    definition, parameters = nnx.split(model)

    def logits(parameters, ids):
        return nnx.merge(definition, parameters)(ids).logits

    expected = reference(tokens()).logits
    rows = jax.jit(jax.vmap(logits, in_axes=(None, 0)))(parameters, tokens()[:, None])
    assert relative_l2(np.asarray(rows[:, 0]), expected) <= tolerance("float32")


@pytest.mark.parametrize("place", ["mlx"], indirect=True)
def test_what_mlx_computes_lazily_is_not_cut(place):
    mx = importlib.import_module("mlx.core")
    model, reference = built(place, kernels="chunked")
    assert_same(place, called(place, model, tokens()), reference(tokens()))
    model, _ = built(place)
    compiled = mx.compile(lambda ids: model(ids).logits)
    assert relative_l2(np.asarray(compiled(mx.array(tokens()))), reference(tokens()).logits) <= tolerance("float32")
    assert set(place.pieces) == {LENGTH}


@pytest.mark.parametrize("place", ["mlx"], indirect=True)
def test_another_block_or_mixer_of_mlx_is_called_once(place):
    """The other blocks are computed in pieces."""
    model, reference = built(place)
    expected = reference(tokens())
    block = model.backbone.layers[1]
    for changed in (block, block.mixer):
        kept = changed.__class__
        changed.__class__ = type("Another", (kept,), {})
        place.pieces.clear()
        assert_same(place, called(place, model, tokens()), expected)
        assert place.pieces == [64, 64, LENGTH % 64, LENGTH]
        changed.__class__ = kept


@pytest.mark.parametrize("place", ["mlx"], indirect=True)
def test_many_pieces_of_mlx_take_no_more_memory_in_a_gradient(place, monkeypatch):
    mx = importlib.import_module("mlx.core")
    model, _ = built(place, remat=True)

    def peak(piece):
        monkeypatch.setattr(place, "FEWEST", piece)
        mx.reset_peak_memory()
        backend_of(place).loss_and_gradients(model, tokens(8193, batch=1))
        return mx.get_peak_memory()

    peak(2048)
    assert peak(256) < 1.5 * peak(2048)


def test_mlx_computes_a_piece_from_copies():
    """Of what has been computed before; with it MLX would go over all the pieces before at every step."""
    mx = pytest.importorskip("mlx.core")
    stack = pytest.importorskip("mamba_core.backends.mlx.stack")
    if why := library.missing():
        pytest.skip(f"needs the native library: {why}")
    seen = []
    native_only = {"selective_scan": {"native": None}, "causal_conv": {"native": None}}

    def run(x, weight):
        seen.append([np.array(value, copy=False).ctypes.data for value in (x, weight)])
        return (x * weight,)

    def total(x, weight):
        return stack.recomputed(run, Kernels.read("native", native_only), mx.float32, (x, weight), copied=1)[0].sum()

    with mx.stream(mx.cpu):
        x, weight = mx.arange(4.0), mx.full((4,), 3.0)
        mx.eval(x, weight)
        given = [np.array(value, copy=False).ctypes.data for value in (x, weight)]
        gradients = mx.grad(total, argnums=(0, 1))(x, weight)
        assert [value.tolist() for value in gradients] == [[3.0] * 4, [0.0, 1.0, 2.0, 3.0]]
    # Forward and again in the gradient.
    assert len(seen) == 2
    for x_of_run, weight_of_run in seen:
        assert x_of_run != given[0]
        assert weight_of_run == given[1]
