"""Parity: what it says of backends that agree, and that it names and places what is wrong in one that does not."""

import json
import math

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.architectures.minimamba import MiniMambaConfig
from mamba_core.cli import main
from mamba_core.comparison import default_length, depth, parity
from mamba_core.registry import installed
from mamba_core.spec.params import parameter_table
from mamba_core.spec.tolerances import tolerance

pytest.importorskip("rich")

CONFIG = mc.MambaConfig(d_model=16, n_layer=3, vocab_size=256, d_state=4, initializer_range=0.3)
MODES = ["forward", "chunked", "stepped", "backward"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "model"
    mc.save(mc.build(CONFIG, backend=installed()[0], seed=1), folder)
    return folder


class Broken:
    """A real backend whose model's outputs or gradients a function changes."""

    def __init__(self, backend, *, node=None, gradients=None):
        self._backend, self._node, self._gradients = backend, node, gradients

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def build(self, *arguments, **settings):
        return BrokenModel(self._backend.build(*arguments, **settings), self._backend, self._node)

    def loss_and_gradients(self, model, tokens):
        loss, gradients = self._backend.loss_and_gradients(model.whole, tokens)
        return loss, self._gradients(gradients) if self._gradients else gradients


class BrokenModel:
    def __init__(self, model, backend, change):
        self.whole, self._native, self._change = model, backend, change

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def __call__(self, ids, state, *, observe):
        def changed(node, value):
            value = self._native.to_numpy(value)
            value = self._change(node, value, state) if self._change else value
            if value is not None:
                observe(node, self._native.from_numpy(value))

        return self.whole(ids, state, observe=changed)


@pytest.fixture
def broken(monkeypatch):
    """Replaces the first installed backend by one that is broken as told, and returns its parity."""

    def run(checkpoint, *, grad=False, **how):
        name = installed()[0]
        wrong = Broken(registry.get(name), **how)
        monkeypatch.setattr(registry, "get", lambda name: wrong)
        return parity(checkpoint, backends=[name], grad=grad).backends[0]

    return run


def verdicts(entry):
    return {mode: compared.first_divergent for mode, compared in entry.modes.items()}


def test_a_backend_agrees(backend, checkpoint):
    found = parity(checkpoint, backends=[backend.name], grad=True, length=21, steps=5)
    assert (found.layers, len(found.tokens), found.chunks, found.steps) == (3, 21, [10, 9, 2], 5)
    entry = found.backends[0]
    assert found.passed
    assert verdicts(entry) == dict.fromkeys(MODES)
    assert 0 < entry.modes["forward"].errors["logits"] <= tolerance("float32")
    assert set(entry.modes["backward"].errors) == {"loss", *parameter_table(CONFIG)}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_sequences(tmp_path, length):
    # From one position the gradient of dt_proj is a multiple of the one number B C. With seed 1 that is 1.2 % of what
    # its terms would be without signs, and keeps their rounding: 1.2e-5 on one processor, less than 1e-5 on another.
    mc.save(mc.build(CONFIG, backend=installed()[0], seed=2), tmp_path / "model")
    found = parity(tmp_path / "model", backends=installed()[:1], length=length, grad=length > 1)
    assert found.passed
    assert sum(found.chunks) == length
    assert found.steps == length


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_its_own_limits(checkpoint, dtype):
    entry = parity(checkpoint, backends=installed()[:1], dtype=dtype).backends[0]
    assert entry.passed
    assert entry.modes["forward"].limits["logits"] == tolerance(dtype)
    assert entry.modes["forward"].errors["logits"] > tolerance("float32")


def test_the_first_node_that_diverges_is_named(checkpoint, broken):
    """Not the worst one, nor one that only follows."""

    def change(node, value, state):
        return value * {"layers.1.conv": 1.001, "layers.1.scan": 1.2, "logits": 1.1}.get(node, 1.0)

    entry = broken(checkpoint, node=change)
    assert verdicts(entry) == dict.fromkeys(MODES[:3], "layers.1.conv")
    # The limit of the logits is a third of an inner node's.
    assert entry.modes["forward"].worst(3) == ["logits", "layers.1.scan", "layers.1.conv"]
    assert entry.modes["forward"].errors["layers.1.conv"] == pytest.approx(1e-3, rel=1e-3)
    assert entry.modes["forward"].errors["layers.1.scan"] == pytest.approx(0.2, rel=1e-3)


def test_a_fault_of_the_carried_state_shows_in_chunks_and_steps_only(checkpoint, broken):
    def change(node, value, state):
        return value * 1.01 if node == "layers.2.scan" and state is not None else value

    assert verdicts(broken(checkpoint, node=change)) == {
        "forward": None,
        "chunked": "layers.2.scan",
        "stepped": "layers.2.scan",
    }


@pytest.mark.parametrize(
    "change",
    [lambda value: None, lambda value: value[..., :-1], lambda value: value[:, :-1], lambda value: value * np.nan],
    ids=["missing", "narrow", "short", "nan"],
)
def test_a_node_that_cannot_be_compared_diverges(checkpoint, broken, change):
    entry = broken(checkpoint, node=lambda node, value, state: change(value) if node == "layers.0.x" else value)
    assert entry.modes["forward"].first_divergent == "layers.0.x"
    assert entry.modes["forward"].errors["layers.0.x"] == math.inf
    assert entry.to_dict()["modes"]["forward"]["errors"]["layers.0.x"] is None


def test_gradients_are_named_in_the_order_of_the_backward_pass(checkpoint, broken):
    early, late = "backbone.layers.0.mixer.D", "backbone.layers.2.mixer.A_log"

    def change(gradients):
        return gradients | {name: gradients[name] * 1.001 for name in (early, late)}

    entry = broken(checkpoint, grad=True, gradients=change)
    assert verdicts(entry) == {"forward": None, "chunked": None, "stepped": None, "backward": late}
    order = list(entry.modes["backward"].errors)
    assert order[:2] == ["loss", "backbone.norm_f.weight"]
    assert order[-1] == "backbone.embeddings.weight"


def test_a_gradient_that_is_missing_diverges(checkpoint, broken):
    lost = "backbone.layers.1.norm.weight"
    entry = broken(checkpoint, grad=True, gradients=lambda found: {key: found[key] for key in found if key != lost})
    assert entry.modes["backward"].first_divergent == lost


def test_limits_grow_with_the_root_of_the_layers_beyond_four():
    assert tolerance("float32", "node", 4) == tolerance("float32", "node")
    assert tolerance("float32", "node", 64) == pytest.approx(4 * tolerance("float32", "node"))
    assert tolerance("bfloat16", "gradient", 16) == pytest.approx(2 * tolerance("bfloat16", "gradient"))


def test_a_deep_model_has_the_tables_limits_in_its_first_layers(tmp_path):
    config = mc.MambaConfig(d_model=8, n_layer=16, vocab_size=17, d_state=2)
    mc.save(mc.build(config, backend=installed()[0]), tmp_path / "deep")
    found = parity(tmp_path / "deep", backends=installed()[:1], length=6, steps=1, grad=True)
    assert found.passed
    limits = found.backends[0].modes["forward"].limits
    assert limits["embedding"] == limits["layers.3.scan"] == tolerance("float32", "node")
    assert limits["layers.15.scan"] == limits["norm_f"] == pytest.approx(2 * tolerance("float32", "node"))
    assert limits["logits"] == pytest.approx(2 * tolerance("float32", "value"))
    backward = found.backends[0].modes["backward"].limits
    assert backward["backbone.embeddings.weight"] == pytest.approx(2 * tolerance("float32", "gradient"))


def test_depth():
    names = ["embedding", "backbone.embeddings.weight", "layers.0.x", "backbone.layers.11.mixer.D", "norm_f", "logits"]
    assert [depth(name, 12) for name in names] == [0, 0, 1, 12, 13, 14]


def test_the_picture_shows_the_largest_error_of_a_layer_even_an_infinite_one():
    pytest.importorskip("matplotlib")
    from mamba_core.cli.parity import HIGHEST, _by_depth

    errors = {"embedding": 0.0, "layers.0.x": 1e-7, "layers.0.z": 1e-6, "layers.1.x": math.inf, "logits": 2e-6}
    assert _by_depth(errors, 2) == ([1, 2, 4], [1e-6, HIGHEST, 2e-6])


def test_the_default_length_shrinks_with_the_model():
    assert default_length(CONFIG) == 128
    assert 60 < default_length(mc.config.preset("mamba-130m")) < 70
    assert default_length(mc.config.preset("mamba-2.8b")) == 16


def test_text_and_tokens(checkpoint):
    run = {"backends": installed()[:1], "steps": 1}
    assert parity(checkpoint, text="hello", **run).tokens == list(b"hello")
    assert parity(checkpoint, tokens=[7, 8, 9], length=2, **run).tokens == [7, 8]
    first, again, other = (parity(checkpoint, length=9, seed=seed, **run).tokens for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"steps": 0}, "steps is 0"),
        ({"length": 0}, "length is 0; expected at least 1"),
        ({"length": 1, "grad": True}, "length is 1; expected at least 2"),
        ({"tokens": []}, "0 tokens to run"),
        ({"tokens": [256]}, "ids outside"),
        ({"backends": ["abacus"]}, "no backend 'abacus'"),
        ({"backends": []}, "no backend to compare"),
    ],
)
def test_bad_settings(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        parity(checkpoint, **settings)


def test_text_without_a_tokenizer_and_weights_that_are_not_finite(tmp_path):
    name = installed()[0]
    config = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=17)
    model = mc.build(config, backend=name)
    mc.save(model, tmp_path / "words")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        parity(tmp_path / "words", text="hello")
    values = {key: value * np.float32(np.nan) for key, value in registry.get(name).parameters(model).items()}
    mc.save(registry.get(name).build(config, values.items()), tmp_path / "nan")
    with pytest.raises(ValueError, match="not finite"):
        parity(tmp_path / "nan")


def test_a_checkpoint_that_is_read_with_help_only(tmp_path):
    run = {"backends": installed()[:1], "length": 3, "grad": True}
    shared = {name: value for name, value in vars(CONFIG).items() if name in MiniMambaConfig.__dataclass_fields__}
    config = MiniMambaConfig(**shared)
    mc.save(mc.build(config, backend=installed()[0]), tmp_path / "mini", layout="minimamba")
    with pytest.raises(ValueError, match="compat"):
        parity(tmp_path / "mini", **run)
    assert parity(tmp_path / "mini", compat="minimamba", **run).passed
    mc.save(mc.build(CONFIG, backend=installed()[0]), tmp_path / "py", layout="mambapy")
    (tmp_path / "py" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot tell the layout"):
        parity(tmp_path / "py", **run)
    assert parity(tmp_path / "py", layout="mambapy", **run).passed


def test_command(checkpoint, tmp_path, capsys):
    names = ",".join(installed())
    arguments = ["parity", str(checkpoint), "--backends", names, "--grad", "--length", "9", "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["length"], report["steps"]) == (True, 9, 8)
    assert [entry["backend"] for entry in report["backends"]] == installed()
    assert all(list(entry["modes"]) == MODES for entry in report["backends"])
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0
    assert "DIVERGES" not in capsys.readouterr().out


def test_command_fails_when_a_backend_is_wrong(checkpoint, tmp_path, monkeypatch, capsys):
    name = installed()[0]
    wrong = Broken(
        registry.get(name), node=lambda node, value, state: value * np.inf if node == "layers.1.B" else value
    )
    monkeypatch.setattr(registry, "get", lambda name: wrong)
    arguments = ["parity", str(checkpoint), "--backends", name, "--length", "5", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "DIVERGES at layers.1.B" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "errors.png").is_file()
    assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["backends"][0]["modes"]["forward"]["first_divergent"] == "layers.1.B"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["{checkpoint}", "--length", "0"], "length is 0"),
        (["{checkpoint}", "--backends", "abacus"], "no backend 'abacus'"),
    ],
)
def test_command_refuses_bad_input_in_one_line(checkpoint, arguments, message, capsys):
    assert main(["parity", *(argument.format(checkpoint=checkpoint) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
