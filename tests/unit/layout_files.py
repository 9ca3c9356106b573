"""Checkpoints of random values in any layout, for the tests of layouts."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from mamba_core import architectures
from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.config import MambaConfig
from mamba_core.spec.params import parameter_table
from mamba_core.weights import tables
from mamba_core.weights.formats import DTYPES, TensorSource, sources_of, write_torch
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_layout

CONFIG = MambaConfig(d_model=6, n_layer=2, vocab_size=13, d_state=3, d_conv=4, dt_rank=2, tie_embeddings=False)
# What mamba_ssm and minimamba have no field for; none of it changes the function.
LOST = ("rescale_prenorm_residual", "initializer_range", "dt_init_floor", "residual_in_fp32")
TIED = ("mamba_minimal",)
LOST += ("bos_token_id", "eos_token_id", "pad_token_id")
TIED_CONFIG = dataclasses.replace(CONFIG, tie_embeddings=True)
OUTER = {
    ("hf", "lm"): ("backbone.embeddings.weight", "backbone.layers.", "backbone.norm_f.weight", "lm_head.weight"),
    ("hf", "features"): ("embeddings.weight", "layers.", "norm_f.weight"),
    ("mamba_ssm", "lm"): ("backbone.embedding.weight", "backbone.layers.", "backbone.norm_f.weight", "lm_head.weight"),
    ("mambapy", "lm"): ("embedding.weight", "mamba.layers.", "norm_f.weight", "lm_head.weight"),
    ("mambapy", "layers"): ("layers.",),
    ("mambapy_mlx", "lm"): ("embedding.weight", "mamba.layers.", "norm_f.weight", "lm_head.weight"),
    ("mambapy_mlx", "layers"): ("layers.",),
    ("minimamba", "lm"): (
        *("embedding.token_embedding.weight", "backbone.layers.", "backbone.norm.weight", "lm_head.lm_head.weight"),
    ),
    ("minimamba", "features"): ("embedding.token_embedding.weight", "backbone.layers.", "backbone.norm.weight"),
    ("mamba_minimal", "lm"): ("embedding.weight", "layers.", "norm_f.weight", "lm_head.weight"),
    ("mlx_lm", "lm"): ("backbone.embeddings.weight", "backbone.layers.", "backbone.norm_f.weight", "lm_head.weight"),
}


def of_architecture(config, name):
    """The same fields in a config of another architecture."""
    kind = architectures.find(name).Config
    names = {item.name for item in dataclasses.fields(config)} & {item.name for item in dataclasses.fields(kind)}
    return kind(**{name: getattr(config, name) for name in names})


# Of sizes that every layout can hold.
MAMBA2 = Mamba2Config(d_model=256, n_layer=1, vocab_size=13, tie_embeddings=False)


def of_layout(config, layout):
    """The same fields in a config of the architecture that a layout holds, tied where it holds no other."""
    held = tables.holding(layout)
    if set(held) == {"mamba2"}:
        config = dataclasses.replace(MAMBA2, task=config.task, tie_embeddings=config.tie_embeddings)
    config = config if config.architecture in held else of_architecture(config, next(iter(held)))
    return dataclasses.replace(config, tie_embeddings=True) if layout in TIED else config


COMPAT = of_architecture(CONFIG, "minimamba")


def write(folder, config, layout, dtype="float32", file_format=None, seed=0) -> Path:
    """A checkpoint of random values, A_log, D and the dt bias in float32."""
    rng = np.random.default_rng(seed)
    sources = []
    for name, parameter in parameter_table(config).items():
        stored = parameter.dtype(dtype)
        value = rng.normal(size=parameter.shape).astype(DTYPES[stored].numpy)
        sources.append(TensorSource(name, parameter.shape, stored, lambda value=value: value))
    folder.mkdir()
    write_layout(folder, config, sources, layout, file_format)
    return folder


def rewrite(source, folder, layout, **options) -> Path:
    opened = open_model(source, **options)
    folder.mkdir()
    write_layout(folder, opened.config, [item for _, _, item in opened.sources()], layout)
    return folder


def options_of(config) -> dict:
    return {"compat": config.architecture if config.architecture in tables.consents() else None}


def contents(folder) -> dict[str, tuple]:
    opened = open_checkpoint(folder)
    return {name: (opened[name].shape, opened[name].dtype, opened[name].tobytes()) for name in opened}


def state_dict(folder, arrays, **fields) -> Path:
    folder.mkdir()
    write_torch(folder / "model.pt", sources_of(arrays))
    if fields:
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def arrays_of(folder) -> dict[str, np.ndarray]:
    opened = open_checkpoint(folder)
    return {name: np.array(opened[name]) for name in opened}
