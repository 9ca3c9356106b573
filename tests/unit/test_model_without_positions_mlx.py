"""An MLX model called with no positions, where MLX fails at arrays without elements, as on CUDA."""

import numpy as np
import pytest

import mamba_core as mc

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402 (after the package that it needs)

from mamba_core.backends.mlx import model as models  # noqa: E402


@pytest.fixture(autouse=True)
def _on_the_cpu():
    """Also the test's own arrays: an array without elements cannot be made on a GPU."""
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize("task", ["lm", "features", "layers"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_as_where_mlx_can_compute_it(masked, task, monkeypatch):
    config = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=11, task=task)
    model = mc.build(config, backend="mlx", dtype="bfloat16", device="cpu")
    some, none = ((2, 5, 16), (2, 0, 16)) if task == "layers" else ((2, 5), (2, 0))
    kind = mx.float32 if task == "layers" else mx.int32
    state = model(mx.ones(some, kind)).state
    positions = {"mask": mx.ones((2, 0), mx.bool_), "segment_ids": mx.zeros((2, 0), mx.int32)} if masked else {}

    def run():
        return model(mx.zeros(none, kind), state, **positions)

    expected = tree_flatten(run())
    monkeypatch.setattr(models, "_fails_on_nothing", lambda: True)
    monkeypatch.setattr(models.Backbone, "__call__", None)
    found = tree_flatten(run())
    assert len(found) == len(expected)
    for (name, value), (other_name, other) in zip(found, expected, strict=True):
        assert (name, value.shape, value.dtype) == (other_name, other.shape, other.dtype)
        np.testing.assert_array_equal(value.astype(mx.float32), other.astype(mx.float32))
