"""FalconMamba in transformers and mlx-lm, which know it by its model_type: no tensor tells it from Mamba-1."""

import dataclasses

from mamba_core.weights.tables import mamba
from mamba_core.weights.tables.base import Field, Table

_CLASSES = {"lm": ("FalconMambaForCausalLM",), "features": ("FalconMambaModel",)}


def _with_norms(table: Table) -> Table:
    return dataclasses.replace(
        table,
        schemes=tuple(dataclasses.replace(scheme, classes=_CLASSES[scheme.task]) for scheme in table.schemes),
        fields={**table.fields, "mixer_rms_eps": Field("mixer_rms_eps", 1e-6)},
        kinds=("falcon_mamba",),
        assumed=False,
        fixed={**table.fixed, "use_bcdt_rms": (True,)},
    )


TABLES = {"hf": _with_norms(mamba.HF), "mlx_lm": _with_norms(mamba.MLX_LM)}
