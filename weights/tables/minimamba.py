"""MiniMamba's arithmetic, in its own layout and in ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba_core import tasks
from mamba_core.weights.names import EMBEDDING, FINAL_NORM, HEAD, SCORE, SCORE_BIAS
from mamba_core.weights.tables import mamba
from mamba_core.weights.tables.base import Scheme, Table
from mamba_core.weights.transforms import Shape

_OUTER = {EMBEDDING: "embedding.token_embedding.weight", FINAL_NORM: "backbone.norm.weight"}
_FIRST_RELEASES = {EMBEDDING: "embedding.weight", FINAL_NORM: "norm_f.weight", HEAD: "lm_head.weight"}
_SAME = (*mamba.LIBRARY_NAMES, "n_layer", "expand", "dt_init_floor", "tie_embeddings")


# Of its classifier: our option -> theirs, which has these values.
_POOLING, _POOLINGS = "pooling_strategy", ("last", "mean", "max")
_CLASSIFIER = {SCORE: "classifier.classifier.weight", SCORE_BIAS: "classifier.classifier.bias"}


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    found = mamba.sizes(shapes)
    if SCORE in shapes:
        labels, _ = mamba.shape_of(shapes, SCORE, "od")
        found["task_options"] = {"num_labels": labels, "bias": True}
    return found


def _completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    values = mamba.library_completed(values, rest, sizes)
    labels, pooling = rest.pop("num_labels", None), rest.pop(_POOLING, None)
    options = dict(values.get("task_options", {}))
    if "num_labels" not in options:  # it is no classifier
        return values
    if labels not in (None, options["num_labels"]):
        raise ValueError(f"config has num_labels {labels!r}, but the classifier has {options['num_labels']} outputs")
    if pooling not in (None, *_POOLINGS):
        raise ValueError(f"config has {_POOLING} {pooling!r}; expected {', '.join(_POOLINGS)}")
    return values | {"task_options": options | ({} if pooling in (None, _POOLINGS[0]) else {"pooling": pooling})}


def _derived(config) -> dict:
    task: Any = tasks.of(config)
    fields = {"dt_rank": config.dt_rank_size}
    if SCORE not in (parameter.name for parameter in task.after(config)):
        return fields
    if not task.bias:
        raise ValueError("bias=False cannot be written as minimamba, whose classifier has one")
    if task.pooling not in _POOLINGS:
        raise ValueError(f"pooling={task.pooling!r} cannot be written as minimamba, which has {', '.join(_POOLINGS)}")
    return fields | {"num_labels": task.num_labels, _POOLING: task.pooling}


def _marked(scheme: Scheme, canonical: str) -> Scheme:
    """The scheme, whose files this tensor tells."""
    rows = tuple(row._replace(mark=row.mark or row.canonical == canonical) for row in scheme.rows)
    return dataclasses.replace(scheme, rows=rows)


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
            mamba.scheme("features", outer=_OUTER),
            _marked(mamba.scheme("sequence_classification", outer=_OUTER | _CLASSIFIER), SCORE),
            # Its releases before 1.0, and the class that 1.0 keeps for them.
            mamba.scheme("lm", "layers", _FIRST_RELEASES),
        ),
        fields=mamba.same(*_SAME) | {"norm_eps": "norm_epsilon"},
        fixed={"rms_norm": (True,)},
        unused=("d_inner", "padded_vocab_size", "use_fast_path", "device", "dtype", "gradient_checkpointing"),
        ignored=("dropout",),
        options={"sequence_classification": ("num_labels", "bias", "pooling")},
        required_of={"lm": {"bias": False}},  # or its head has one too
        consent="MiniMamba computes another function than Mamba: it adds the dt bias twice and its gate has no SiLU, "
        "so a plain conversion would change the outputs",
        sizes=_sizes,
        completed=_completed,
        derived=_derived,
    ),
}
