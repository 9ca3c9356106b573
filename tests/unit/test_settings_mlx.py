"""The setting of the whole process that the MLX backend makes: at its first use, not when it is imported."""

import os
import subprocess
import sys

import numpy as np
import pytest

import mamba_core as mc

mx = pytest.importorskip("mlx.core")

from mamba_core.backends.mlx import arrays, ops  # noqa: E402 (after the package that it needs)
from mamba_core.backends.mlx.ops import (  # noqa: E402
    attention,
    causal_conv,
    linear,
    mixture_of_experts,
    rms_norm,
    selective_scan,
    ssd,
)

PROGRAM = """
import os
import mamba_core as mc
backend = mc.registry.get("mlx")
print(os.environ.get("MLX_ENABLE_TF32"), "|", backend.in_force())
mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=8), backend="mlx")
print(os.environ.get("MLX_ENABLE_TF32"), "|", backend.in_force())
"""
X, W = np.ones((1, 3, 2), np.float32), np.ones((2, 3), np.float32)
USES = {
    "scan": lambda x, w: selective_scan.selective_scan(x, x, -w, mx.ones((1, 3, 3)), mx.ones((1, 3, 3))),
    "step": lambda x, w: selective_scan.selective_step(
        x[:, 0], x[:, 0], -w, mx.ones((1, 3)), mx.ones((1, 3)), state=mx.ones((1, 2, 3))
    ),
    "ssd": lambda x, w: ssd.ssd(x[..., None], x, -w[:, 0], mx.ones((1, 3, 1, 3)), mx.ones((1, 3, 1, 3))),
    "ssd's step": lambda x, w: ssd.ssd_step(
        x[:, 0, :, None], x[:, 0], -w[:, 0], mx.ones((1, 1, 3)), mx.ones((1, 1, 3)), state=mx.ones((1, 2, 1, 3))
    ),
    "convolution": lambda x, w: causal_conv.causal_conv(x, w),
    "attention": lambda x, w: attention.attention(*(x[:, :, None],) * 3),
    "experts": lambda x, w: mixture_of_experts.mixture_of_experts(
        x, mx.ones((1, 3, 2)), mx.ones((2, 2, 2)), mx.ones((2, 2, 1)), top_k=1
    ),
    "convolution's step": lambda x, w: causal_conv.causal_conv_step(x[:, 0], w, state=mx.ones((1, 2, 2))),
    "linear": lambda x, w: linear.linear(x, w.T),
    "norm": lambda x, w: rms_norm.rms_norm(x, None, 1e-5),
    "model": lambda x, w: mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=8), backend="mlx"),
}


@pytest.mark.parametrize(
    ("given", "before", "after"),
    [
        (None, ("None", "not set; 0 from the first model or op of mamba_core"), ("0", "0, set by mamba_core")),
        ("1", ("1", "1, set by the user"), ("1", "1, set by the user")),
        ("0", ("0", "0, set by the user"), ("0", "0, set by the user")),
    ],
)
def test_float32_is_multiplied_in_float32_unless_told_otherwise(given, before, after):
    environment = {name: value for name, value in os.environ.items() if name != arrays.TF32}
    environment |= {} if given is None else {arrays.TF32: given}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    lines = [f"{value} | {{'MLX_ENABLE_TF32': '{text}'}}" for value, text in (before, after)]
    assert found.stdout.splitlines() == lines


@pytest.mark.parametrize("use", USES)
def test_every_use_makes_it(use, monkeypatch):
    monkeypatch.delenv(arrays.TF32, raising=False)
    monkeypatch.setattr(arrays, "_asked_for", False)
    USES[use](mx.array(X), mx.array(W))
    assert os.environ[arrays.TF32] == "0"


def test_every_op_is_among_them():
    """Whoever adds an op adds a use."""
    known = {
        "selective_scan",
        "causal_conv",
        "linear",
        "rms_norm",
        "cross_entropy",
        "ssd",
        "ssd_step",
        "attention",
        "mixture_of_experts",
    }  # the fifth multiplies nothing
    assert set(ops.available_kernels()) == known
