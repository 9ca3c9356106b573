"""What the tests of each framework's own transformations share: a small model as it comes, and its logits."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry

CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=29, d_state=4, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 29, (2, 20)).astype(np.int32)
MASK = np.random.default_rng(1).random(IDS.shape) < 0.7
SEGMENTS = np.sort(np.random.default_rng(2).integers(0, 3, IDS.shape)).astype(np.int32)


def plain(name, **options):
    """(model, ids, logits) of a backend, without any transformation; options as of `mamba_core.build`."""
    if missing := registry.missing_packages(name):
        pytest.skip(f"{', '.join(missing)} not installed")
    backend = registry.get(name)
    model = mc.build(CONFIG, backend=name, **options)
    ids = backend.from_numpy(IDS, device=model.device)
    return model, ids, backend.to_numpy(model(ids).logits)


def scan_arguments() -> dict:
    """x, delta, A, B, C of a small scan; A is to be -exp of what stands here."""
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 5, 2), "delta": (1, 5, 2), "A": (2, 3), "B": (1, 5, 3), "C": (1, 5, 3)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}
