"""What the oracles share."""

import importlib
import os
import sys
from types import ModuleType
from unittest import mock

import pytest

# MLX's own models are to compute in float32 whichever of our backends a test imports: see `backends/mlx`.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# mambapy.lm imports these for Mamba-2 only, and they import Triton.
UNUSED = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")


@pytest.fixture(scope="session")
def lm():
    """mambapy's module of language models."""
    pytest.importorskip("mambapy.mamba")
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")
    stubs = {name: ModuleType(name) for name in names}
    vars(stubs[names[-1]]).update(dict.fromkeys(UNUSED))
    with mock.patch.dict(sys.modules, stubs):
        return importlib.import_module("mambapy.lm")


@pytest.fixture(scope="session")
def transformers():
    """transformers with its own functions: it would give arrays on the CPU to a mamba_ssm that is compiled for GPUs."""
    module = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mamba_ssm", "causal_conv1d"):
            patch.setitem(sys.modules, name, None)
        importlib.import_module("transformers.models.mamba.modeling_mamba")
    return module
