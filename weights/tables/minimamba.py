"""MiniMamba's arithmetic, in its own layout and in ours."""

import dataclasses

from mamba_core.weights.names import EMBEDDING, FINAL_NORM, HEAD
from mamba_core.weights.tables import mamba
from mamba_core.weights.tables.base import Table

_OUTER = {EMBEDDING: "embedding.token_embedding.weight", FINAL_NORM: "backbone.norm.weight"}
_FIRST_RELEASES = {EMBEDDING: "embedding.weight", FINAL_NORM: "norm_f.weight", HEAD: "lm_head.weight"}
_SAME = (*mamba.LIBRARY_NAMES, "n_layer", "expand", "dt_init_floor", "tie_embeddings")


def _derived(config) -> dict:
    return {"dt_rank": config.dt_rank_size}


TABLES = {
    # A model_type that transformers' Auto classes refuse, and an activation that its other classes refuse.
    "hf": dataclasses.replace(
        mamba.HF,
        kinds=("mamba_core_minimamba",),
        assumed=False,
        fixed={**mamba.HF.fixed, "hidden_act": ("minimamba",)},
        constants={"hidden_act": "minimamba"},
    ),
    "minimamba": Table(
        schemes=(
            mamba.scheme("lm", outer=_OUTER | {HEAD: "lm_head.lm_head.weight"}),
            mamba.scheme(
                "features",
                outer=_OUTER,
                left_out=("classifier.classifier.weight", "classifier.classifier.bias"),
            ),
            # Its releases before 1.0, and the class that 1.0 keeps for them.
            mamba.scheme("lm", "layers", _FIRST_RELEASES),
        ),
        fields=mamba.same(*_SAME) | {"norm_eps": "norm_epsilon"},
        fixed={"rms_norm": (True,)},
        unused=("d_inner", "padded_vocab_size", "use_fast_path", "device", "dtype", "gradient_checkpointing"),
        required_of={"lm": {"bias": False}},  # or its head has one too
        consent="MiniMamba computes another function than Mamba: it adds the dt bias twice and its gate has no SiLU, "
        "so a plain conversion would change the outputs",
        sizes=mamba.sizes,
        completed=mamba.library_completed,
        derived=_derived,
    ),
}
