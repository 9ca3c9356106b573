"""The stack of an MLX model: other mixers, feed-forwards and ways than those that are there."""

from types import SimpleNamespace

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.spec.tolerances import relative_l2

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mamba_core.backend import LayerState  # noqa: E402 (after the package that it needs)
from mamba_core.backends.mlx import blocks, stack  # noqa: E402
from mamba_core.backends.mlx.mixers import Options, s6  # noqa: E402
from mamba_core.backends.mlx.mixers.mamba import MambaMixer  # noqa: E402
from mamba_core.backends.mlx.ways import Taken, ranked  # noqa: E402

BACKEND = registry.get("mlx")
CONFIG = mc.MambaConfig(d_model=16, n_layer=4, vocab_size=29, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 29, (2, 50)).astype(np.int32)


class NormedMixer(nn.Module):
    """Mamba-1's, with norms without weight of dt, B and C."""

    last_position = True
    width = s6.width

    def __init__(self, config, layer, options):
        super().__init__()
        s6.add_parameters(self, config, layer, options)

    def __call__(self, hidden, state, call):
        x, z = s6.project_in(self, hidden, call)
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.norm_selection(self, *s6.select(self, x, call), 1e-6, call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state.ssm, call)
        return s6.project_out(self, y, call), LayerState(conv, ssm)


class FeedForward(nn.Module):
    def __init__(self, config, layer, options):
        super().__init__()
        self.up, self.down = nn.Linear(config.d_model, 24), nn.Linear(24, config.d_model)

    def __call__(self, hidden, call):
        return self.down(call.observe("up", nn.silu(self.up(hidden))))


class Attention(nn.Module):
    """A mixer that carries nothing, and looks at all positions."""

    def __init__(self, config, layer, options):
        super().__init__()

    def __call__(self, hidden, state, call):
        return mx.cumsum(hidden, axis=1) / mx.arange(1, hidden.shape[1] + 1)[:, None], state


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(stack, "PIECE_BYTES", 1)
    monkeypatch.setattr(stack, "FEWEST", 16)
    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def parts(monkeypatch):
    """Three more files in `mixers/`."""
    more = {"normed": NormedMixer, "feed_forward": FeedForward, "attention": Attention}
    find = blocks.mixer_class
    monkeypatch.setattr(blocks, "mixer_class", lambda kind: more.get(kind) or find(kind))


def built(dtype="float32"):
    return mc.build(CONFIG, backend="mlx", device="cpu", dtype=dtype, seed=1)


def with_block(model, index, mixer, feed_forward=None):
    """Another block in the place of one, with the values that they share."""
    options = Options(model.policy)
    block, old = blocks.Block(CONFIG, index, mixer, feed_forward, options), model.backbone.layers[index]
    if mixer == "normed":
        block.mixer.update(old.mixer.parameters())
    block.norm.weight = old.norm.weight
    model.backbone.layers[index] = block
    return block


def assert_consistent(model, steps=True):
    """A call, in pieces; a prefill; steps; a call whose nodes are observed; gradients with blocks computed again."""
    seen = {}
    whole = model(mx.array(IDS), observe=seen.__setitem__)
    assert all(name.startswith("layers.") or name in ("embedding", "norm_f", "logits") for name in seen)
    found = model(mx.array(IDS))
    assert relative_l2(np.array(found.logits), np.array(whole.logits)) < 1e-5
    prefilled = BACKEND.prefill(model, IDS, np.ones(IDS.shape, bool))
    assert relative_l2(np.array(prefilled.logits), np.array(whole.logits[:, -1, :29])) < 1e-5
    if steps:
        state, logits = None, []
        for position in range(20):
            out = model(mx.array(IDS[:, position : position + 1]), state)
            state, logits = out.state, [*logits, out.logits]
        assert relative_l2(np.array(mx.concatenate(logits, axis=1)), np.array(whole.logits[:, :20])) < 1e-5
    gradients = []
    for remat in (False, True):
        model.remat = remat
        gradients.append(nn.value_and_grad(model, lambda model: model(mx.array(IDS)).logits.square().mean())(model)[0])
    model.remat = False
    assert gradients[0].item() == pytest.approx(gradients[1].item(), rel=1e-5)
    return seen


@pytest.mark.parametrize("index", [1, 3])
def test_a_mixer_of_the_functions_of_s6_has_all_of_their_fast_paths(parts, index):
    model = built()
    before = np.array(model(mx.array(IDS)).logits)
    with_block(model, index, "normed")
    lengths = []
    scan = s6.selective_scan.scan

    def watched(call, x, *arguments, **options):
        lengths.append((x.shape[1], options["z"] is None))
        return scan(call, x, *arguments, **options)

    seen = assert_consistent(model)
    assert relative_l2(np.array(model(mx.array(IDS)).logits), before) > 1e-2
    assert {f"layers.{index}.{name}_norm" for name in ("dt", "B", "C")} <= set(seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s6.selective_scan, "scan", watched)
        model(mx.array(IDS))
        pieces = not BACKEND.available_kernels("cpu")["selective_scan"]["native"]
        assert {length for length, _ in lengths} == ({16, 2} if pieces else {50})
        lengths.clear()
        BACKEND.prefill(model, IDS[:, :9], np.ones((2, 9), bool))
        assert lengths == [(9, False)] * 3 + [(9, True)]


@pytest.mark.parametrize("index", [0, 3])
def test_a_block_with_a_feed_forward(parts, index):
    model = built()
    before = np.array(model(mx.array(IDS)).logits)
    block = with_block(model, index, "normed", "feed_forward")
    assert_consistent(model)
    assert relative_l2(np.array(model(mx.array(IDS)).logits), before) > 1e-2
    state = model.init_state(2).layers[index]
    residual = mx.random.normal((2, 5, 16))
    call = stack.call_of(None, None, length=5)
    hidden, _ = block.mixer(block.norm(residual), state, call)
    wanted = residual + hidden
    wanted = wanted + block.feed_forward(block.norm2(wanted), call)
    assert mx.array_equal(block(residual, state, call)[0], wanted).item()


def test_a_layer_that_carries_nothing(parts):
    model = built()
    with_block(model, 1, "attention")
    layers = list(model.backbone.layers)
    state = model.init_state(2).layers
    residual, call = mx.random.normal((2, 20, 16)), stack.call_of(None, None, length=20)
    for remat in (False, True):
        _, _, after = stack.run(layers, residual, [state[0], (), *state[2:]], call, remat)
        assert after[1] == ()
    assert_consistent(model, steps=False)


# --- another way ---------------------------------------------------------------------------------


def fast(blocks, residual, states, call):
    """Mamba-1's mixers, without a mask, for a few positions; leaves the last block's output to be added."""
    if residual.shape[1] > 20 or not call.plain or call.observed:
        return "it computes few positions"
    count = next((i for i, block in enumerate(blocks) if type(block.mixer) is not MambaMixer), len(blocks))
    if not count:
        return f"the mixer is {type(blocks[0].mixer).__name__}"

    def run(residual, pending, states):
        after = []
        for block, state in zip(blocks[:count], states, strict=True):
            residual = residual if pending is None else residual + pending
            pending, state = block.mixer(block.norm(residual), state, call._replace(last=False))
            after.append(state)
        return residual, pending, tuple(after)

    return Taken(count, run)


def test_a_way_takes_runs_of_its_own_blocks_and_plain_takes_the_rest(parts, monkeypatch):
    model = built()
    with_block(model, 2, "normed")
    wanted, few = model(mx.array(IDS)), model(mx.array(IDS[:, :8]))
    monkeypatch.setattr(stack, "ranked", lambda: (("fast", SimpleNamespace(take=fast)), *ranked()))
    why = {"fast": "the mixer is NormedMixer"}
    assert BACKEND.explain(model, 2, 8) == [(0, 1, "fast", {}), (2, 2, "plain", why), (3, 3, "fast", {})]
    assert BACKEND.explain(model, 2, 50) == [(0, 3, "plain", {"fast": "it computes few positions"})]
    for given, length in ((wanted, 50), (few, 8)):
        found = model(mx.array(IDS[:, :length]))
        assert relative_l2(np.array(found.logits), np.array(given.logits)) < 1e-6
        for layer, other in zip(found.state.layers, given.state.layers, strict=True):
            assert relative_l2(np.array(layer.ssm), np.array(other.ssm)) < 1e-6
    assert_consistent(model)


def test_explain_computes_nothing(monkeypatch):
    model = built()
    monkeypatch.setattr(blocks.Block, "__call__", None)
    assert BACKEND.explain(model, 1, 100) == [(0, 3, "plain", {})]
