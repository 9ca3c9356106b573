"""Which kernel computes each op of an MLX model: a policy by op."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.kernels import Kernels
from mamba_core.spec.tolerances import relative_l2

mx = pytest.importorskip("mlx.core")

from mamba_core.backends.mlx.kernels import numpy_linear  # noqa: E402 (after the package that it needs)
from mamba_core.backends.mlx.ops import causal_conv, cross_entropy, linear, rms_norm, selective_scan  # noqa: E402

OPS = {
    "selective_scan": selective_scan,
    "causal_conv": causal_conv,
    "linear": linear,
    "rms_norm": rms_norm,
    "cross_entropy": cross_entropy,
}
PLAIN = {
    "causal_conv": "shifted",
    "cross_entropy": "plain",
    "linear": "plain",
    "rms_norm": "plain",
    "selective_scan": "sequential",
}
CONFIG = mc.MambaConfig(d_model=32, n_layer=2, vocab_size=29, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 29, (2, 13)).astype(np.int32)
needs_native = pytest.mark.skipif(library.missing() is not None, reason="native library")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """op -> the kernels that computed it, whatever a product's size is and on every system."""
    monkeypatch.setattr(numpy_linear, "NUMPY_IS_FASTER", True)
    monkeypatch.setattr(numpy_linear, "LEAST", 0)
    called = {op: set() for op in OPS}
    for op, module in OPS.items():
        for name, kernel in list(module.KERNELS.items()):

            def counted(*arguments, op=op, name=name, kernel=kernel):
                called[op].add(name)
                return kernel(*arguments)

            monkeypatch.setitem(module.KERNELS, name, counted)
    with mx.stream(mx.cpu):
        yield called


def run(kernels, dtype="float32"):
    model = mc.build(CONFIG, backend="mlx", device="cpu", dtype=dtype, kernels=kernels)
    loss, _ = registry.get("mlx").loss_and_gradients(model, IDS)
    return model, loss


def used(model) -> dict[str, str]:
    """Op -> kernel, without the recurrence that this model has not."""
    return {op: kernel for op, kernel in model.kernels.items() if op in OPS}


CHOICES = {
    "plain": PLAIN,
    "sequential": PLAIN,
    "chunked": PLAIN | {"selective_scan": "chunked", "linear": "numpy"},
    "native": PLAIN | {"selective_scan": "native", "causal_conv": "native", "linear": "numpy"},
    "auto": PLAIN | {"selective_scan": "native", "causal_conv": "native", "linear": "numpy"},
}


@needs_native
@pytest.mark.parametrize("kernels", CHOICES)
def test_a_name_means_a_kernel_for_each_op(kernels, calls):
    model, loss = run(kernels)
    assert used(model) == CHOICES[kernels]
    assert calls == {op: {name} for op, name in CHOICES[kernels].items()}
    assert abs(loss - run("plain")[1]) < 1e-4


@needs_native
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in OPS[op].KERNELS])
def test_a_mapping_means_one_op(op, name, calls):
    if registry.get("mlx").available_kernels("cpu")[op][name] is not None:
        with pytest.raises(ValueError, match=name):
            run({op: name})
        return
    model, loss = run({op: name})
    assert used(model) == CHOICES["auto"] | {op: name}
    assert calls == {other: {kernel} for other, kernel in (CHOICES["auto"] | {op: name}).items()}
    assert abs(loss - run("plain")[1]) < 1e-4


@needs_native
@pytest.mark.parametrize("mixed", [{"selective_scan": "chunked"}, {"causal_conv": "shifted"}, {"linear": "plain"}])
def test_blocks_computed_again_with_a_mixed_policy(mixed):
    model, _ = run(mixed)
    wanted = registry.get("mlx").loss_and_gradients(model, IDS)
    model.remat = True
    found = registry.get("mlx").loss_and_gradients(model, IDS)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for name, value in found[1].items():
        assert relative_l2(value, wanted[1][name]) < 1e-5, name


def test_a_name_of_another_op_or_dtype_is_refused():
    with pytest.raises(ValueError, match="op 'scan'"):
        run({"scan": "chunked"})
    with pytest.raises(ValueError, match="causal_conv has no kernel 'chunked'"):
        run({"causal_conv": "chunked"})
    with pytest.raises(ValueError, match="no kernel 'nonsense'"):
        run("nonsense")
    with pytest.raises(ValueError, match="x is float16"):
        run("native", "float16")
    with pytest.raises(ValueError, match="metal"):
        run("metal")


def test_a_policy_for_an_op_of_other_backends_is_accepted_where_it_leaves_it_to_the_backend(calls):
    for name in ("auto", "plain"):
        _, loss = run({"block_step": name, "fused_mixer": name, "selective_scan": "chunked"})
        assert abs(loss - run("plain")[1]) < 1e-4
        assert "chunked" in calls["selective_scan"]
    with pytest.raises(ValueError, match="block_step has no kernel 'native' on this backend"):
        run({"block_step": "native"})


def test_a_model_keeps_its_policy_and_tells_its_mixers():
    model, _ = run("chunked")
    assert isinstance(model.policy, Kernels)
    assert all(block.mixer.kernels is model.policy for block in model.backbone.layers)
    assert model.policy.of("linear") == "auto"
