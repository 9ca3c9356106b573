"""One Mamba for PyTorch, MLX and JAX: build, load, train, generate, convert and compare.

Importing this package imports no framework; a backend is imported when it is first asked for.
"""

from importlib.util import find_spec

# A checkout has these parts beside this folder; it is the installation that puts them into the package.
if find_spec("mamba_core.backends") is None:
    raise ImportError("mamba_core is imported from a checkout that is not installed; run pip install -e . in it")

from mamba_core import backends
from mamba_core.backend import Hidden, LayerState, Output, State
from mamba_core.config import PRESETS, MambaConfig
from mamba_core.factory import build, load, load_state, save, save_state
from mamba_core.generation import generate, stream
from mamba_core.ops import selective_scan, selective_step
from mamba_core.parity import parity
from mamba_core.training import TrainSettings, train
from mamba_core.version import VERSION
from mamba_core.weights.convert import convert, inspect

__all__ = [
    "PRESETS",
    "Hidden",
    "LayerState",
    "MambaConfig",
    "Output",
    "State",
    "TrainSettings",
    "backends",
    "build",
    "convert",
    "generate",
    "inspect",
    "load",
    "load_state",
    "parity",
    "save",
    "save_state",
    "selective_scan",
    "selective_step",
    "stream",
    "train",
]
__version__ = VERSION
