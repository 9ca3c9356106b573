"""One Mamba for PyTorch, MLX and JAX: build, load, train, generate, convert and compare.

Importing this package imports no framework; a backend is imported when it is first asked for. The config of every
architecture is here under its name, such as `MambaConfig`.
"""

from importlib import util as _util
from typing import Any

# A checkout has these parts beside this folder; it is the installation that puts them into the package.
if _util.find_spec("mamba_core.backends") is None:
    raise ImportError("mamba_core is imported from a checkout that is not installed; run pip install -e . in it")

from mamba_core import architectures, backends
from mamba_core.backend import Forecast, Hidden, LayerState, Output, State
from mamba_core.carried import LayerInfo, StateInfo, grown, rewind, room, state_info
from mamba_core.comparison import Parity, parity
from mamba_core.config import MambaConfig
from mamba_core.explanation import Explanation, explain
from mamba_core.factory import build, load, load_state, save, save_state
from mamba_core.forecasting import forecast
from mamba_core.generation import Result, Stream, generate, stream
from mamba_core.kernels import Kernels
from mamba_core.ops import (
    attention,
    causal_conv,
    causal_conv_step,
    mixture_of_experts,
    selective_scan,
    selective_step,
    ssd,
    ssd_step,
)
from mamba_core.registry import BackendInfo
from mamba_core.registry import backends as available_backends
from mamba_core.sampling import Sampling
from mamba_core.spec.ops.attention import KeyValueCache, Rotary
from mamba_core.texts import classify_text
from mamba_core.training import TrainSettings, train
from mamba_core.version import VERSION
from mamba_core.vision import classify_images
from mamba_core.weights.convert import Conversion, Inspection, convert, inspect
from mamba_core.weights.formats import CheckpointError

__all__ = [
    "BackendInfo",
    "CheckpointError",
    "Conversion",
    "Explanation",
    "Forecast",
    "Hidden",
    "Inspection",
    "Kernels",
    "KeyValueCache",
    "LayerInfo",
    "LayerState",
    "MambaConfig",
    "Output",
    "Parity",
    "Result",
    "Rotary",
    "Sampling",
    "State",
    "StateInfo",
    "Stream",
    "TrainSettings",
    "attention",
    "available_backends",
    "backends",
    "build",
    "causal_conv",
    "causal_conv_step",
    "classify_images",
    "classify_text",
    "convert",
    "explain",
    "forecast",
    "generate",
    "grown",
    "inspect",
    "load",
    "load_state",
    "mixture_of_experts",
    "parity",
    "rewind",
    "room",
    "save",
    "save_state",
    "selective_scan",
    "selective_step",
    "ssd",
    "ssd_step",
    "state_info",
    "stream",
    "train",
]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """`PRESETS`, and the config class of an architecture by its name."""
    if name == "PRESETS":
        return architectures.presets()
    for config in architectures.configs() if name.endswith("Config") else ():
        if config.__name__ == name:
            return config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
