"""mamba_ssm's files, imported where there is no GPU: its reference functions need neither CUDA nor Triton."""

import contextlib
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest

# mamba_ssm imports its CUDA extension and Triton wherever it is entered.
STUBS = {"selective_scan_cuda": {}, "mamba_ssm.ops.triton.layer_norm": {"_layer_norm_fwd": None}}
PACKAGES = (
    *("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils", "mamba_ssm.modules", "mamba_ssm.models"),
    "mamba_ssm.distributed",
)


@contextlib.contextmanager
def importable(**modules):
    """Its files can be imported inside. The stubs do not stay: PyTorch would find that Triton too.

    modules: others of its modules that are there already, by their names under mamba_ssm with "__" for dots.
    """
    spec = find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba_ssm not installed")
    triton = mock.MagicMock(__version__="3.0.0", Config=lambda kwargs, **_: SimpleNamespace(kwargs=kwargs))
    triton.autotune = lambda configs, **_: lambda kernel: SimpleNamespace(configs=configs)  # which they look into
    packages = {"triton": triton, "triton.language": triton.language, "causal_conv1d": None}
    for package in PACKAGES:
        packages[package] = ModuleType(package)
        packages[package].__path__ = [f"{spec.submodule_search_locations[0]}/{'/'.join(package.split('.')[1:])}"]
    for module, contents in STUBS.items():
        packages[module] = ModuleType(module)
        vars(packages[module]).update(contents)
    packages |= {f"mamba_ssm.{name.replace('__', '.')}": module for name, module in modules.items()}
    with mock.patch.dict(sys.modules, packages):
        yield


def imported(name):
    """Their module of that name under mamba_ssm."""
    with importable():
        return importlib.import_module(f"mamba_ssm.{name}")


def in_float64(function, *args, **kwargs):
    """They call .float() inside; their algorithm in float64 is what is wanted."""
    import torch

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return function(*args, **kwargs)
