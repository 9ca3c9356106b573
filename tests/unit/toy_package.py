"""A package with an architecture of its own, as somebody else would install it: files and an entry point."""

import importlib
import sys
from pathlib import Path

from mamba_core import architectures, discovery, tasks
from mamba_core.spec import ops

ARCHITECTURE = '''
"""Blocks of a norm and a joined projection, and experts that nothing computes with."""

from dataclasses import dataclass
from typing import ClassVar

from mamba_core.architectures.base import BaseConfig, Block, Traits
from mamba_core.spec.graph import Node
from mamba_core.spec.init import ones, uniform
from mamba_core.spec.params import Parameter


@dataclass(frozen=True, kw_only=True)
class ToyConfig(BaseConfig):
    experts: int = 3
    width: int = 2
    gains: tuple[float, ...] = (1.0, 2.0)
    architecture: ClassVar[str] = "NAME"


Config = ToyConfig
PRESETS = {}
TRAITS = Traits()


def blocks(config):
    return (Block("NAME"),) * config.n_layer


def state(config, layer):
    return ()


def parameters(config):
    d, e, w = config.d_model, config.experts, config.width
    for layer in range(config.n_layer):
        here = f"backbone.layers.{layer}."
        yield Parameter(here + "norm.weight", "d", (d,), ones, float32=True, decay=False)
        yield Parameter(here + "qkv.weight", "ed", (d + 2 * w, d), uniform(1.0), parts=(("q", d), ("k", w), ("v", w)))
        yield Parameter(here + "out.weight", "de", (d, d + 2 * w), uniform(1.0))
        yield Parameter(here + "experts.gate_up", "eed", (e, 2 * w, d), uniform(1.0))
        yield Parameter(here + "experts.down", "ede", (e, d, w), uniform(1.0))


def graph(config, residual):
    for layer in range(config.n_layer):
        here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
        yield Node(here + "norm", "rms_norm", (residual,), {"weight": weights + "norm.weight"}, {"eps": 1e-5})
        yield Node(here + "qkv", "linear", (here + "norm",), {"weight": weights + "qkv.weight"})
        yield Node(here + "out", "linear", (here + "qkv",), {"weight": weights + "out.weight"})
        yield Node(here + "residual", "add", (residual, here + "out"))
        residual = here + "residual"
'''

TABLE = """
from mamba_core.weights.names import EMBEDDING, FINAL_NORM, HEAD
from mamba_core.weights.tables.base import Field, Row, Scheme, Table

LAYER, THEIRS = "backbone.layers.{layer}.", "model.blocks.{layer}."
ROWS = (
    Row(EMBEDDING, "model.embed.weight", mark=True),
    Row(LAYER + "norm.weight", THEIRS + "ln.weight", mark=True),
    Row(LAYER + "qkv.weight", tuple(THEIRS + f"{name}.weight" for name in "qkv")),
    Row(LAYER + "out.weight", THEIRS + "out.weight"),
    Row(LAYER + "experts.gate_up", tuple(THEIRS + f"moe.{{expert}}.{name}.weight" for name in ("gate", "up"))),
    Row(LAYER + "experts.down", THEIRS + "moe.{expert}.down.weight"),
    Row(FINAL_NORM, "model.ln_f.weight"),
    Row(HEAD, "lm_head.weight"),
)
TABLES = {
    "hf": Table(
        schemes=(Scheme("lm", ROWS, ("ToyForCausalLM",)),),
        fields={
            "d_model": Field("hidden_size", 8),
            "n_layer": "num_hidden_layers",
            "vocab_size": "vocab_size",
            "experts": "num_toy_experts",
            "width": "toy_width",
            "tie_embeddings": "tie_word_embeddings",
        },
        kinds=("toy",),
        fixed={"toy_activation": ("relu",)},
        constants={"toy_activation": "relu"},
    ),
    "mamba_ssm": Table(
        schemes=(Scheme("lm", ROWS),),
        fields={
            "d_model": Field("d_model", 2560),
            "n_layer": Field("n_layer", 64),
            "vocab_size": "vocab_size",
            "experts": "ssm_cfg.experts",
            "width": "ssm_cfg.toy_width",
            "tie_embeddings": "tie_embeddings",
        },
        kinds=("Toy",),
    ),
    "toy_layout": Table(
        schemes=(Scheme("lm", tuple(Row(row.canonical, row.canonical, mark=row.mark) for row in ROWS)),),
        fields={"d_model": "d", "n_layer": "n", "vocab_size": "v", "experts": "e", "width": "w"},
        kinds=("toy",),
    ),
}
"""

LAYOUT = """
from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(file_format="npz", keys=("toy_kind",), kind=("toy_kind",), hides="changed")
"""

TASK = """
from dataclasses import dataclass
from typing import Any

from mamba_core.spec.graph import Node
from mamba_core.spec.init import uniform
from mamba_core.spec.params import Parameter
from mamba_core.tasks import base


@dataclass(frozen=True)
class Task(base.Task):
    labels: int = 2

    def after(self, config: Any):
        yield from super().after(config)
        yield Parameter("score.weight", "vd", (self.labels, config.d_model), uniform(1.0))

    def closing(self, config: Any, residual: str):
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("score", "linear", ("norm_f",), {"weight": "score.weight"})
"""

# Of the tables, the architectures "toy" and "bare"; the latter has no table.
FILES = {
    "architectures/toy.py": ARCHITECTURE.replace("NAME", "toy"),
    "architectures/bare.py": ARCHITECTURE.replace("NAME", "bare"),
    "weights/tables/toy.py": TABLE,
    "weights/layouts/toy_layout.py": LAYOUT,
    "tasks/scores.py": TASK,
}


def write(folder: Path, files: dict[str, str] = FILES) -> None:
    """The package and its metadata, in a folder that is to be on the path."""
    for name, text in files.items():
        path = folder / "toy_package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    metadata = folder / "toy_package-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_package\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[mamba_core.extensions]\ntoy = toy_package\n")


def forget() -> None:
    """What was found before is searched for again."""
    for cached in (discovery.roots, discovery.names, discovery.find, discovery._places, ops.nodes, ops.public):
        cached.cache_clear()
    tasks._made.cache_clear()
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_package"]:
        del sys.modules[name]


def config(name: str = "toy", **changes):
    fields = {"d_model": 6, "n_layer": 2, "vocab_size": 13, "tie_embeddings": False}
    return architectures.find(name).Config(**fields | changes)
