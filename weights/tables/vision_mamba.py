"""Vision Mamba as hustvl/Vim has it, the blocks alone as mambapy.vim has them, and both in our own layout."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mamba_core.spec.images import NAMES
from mamba_core.tasks.image_classification import Task
from mamba_core.weights.names import EMBEDDING, FINAL_NORM
from mamba_core.weights.tables import mamba, own_table
from mamba_core.weights.tables.base import Field, Row, Scheme, Table
from mamba_core.weights.transforms import Shape

_REVERSE = (
    *("mixer.A_b_log", "mixer.D_b", "mixer.conv1d_b.weight", "mixer.conv1d_b.bias", "mixer.x_proj_b.weight"),
    *("mixer.dt_proj_b.weight", "mixer.dt_proj_b.bias"),
)
_MARK = "mixer.A_b_log"
PUBLISHED = 224  # rows and columns of the images that the published models are for


def _scheme(task: str, layers: str, outer: Mapping[str, str], marks: tuple[str, ...] = (), rate: str = _MARK) -> Scheme:
    """rate: the name of the reverse direction's A. marks: canonical names that tell such a file, beside that."""
    plain = mamba.scheme(task, layers, outer, marks=())
    names = {name: rate if name == _MARK else name for name in _REVERSE}
    here, there = f"{mamba.LAYERS}.{{layer}}.", f"{layers}.{{layer}}."
    reverse = [Row(here + name, there + theirs, mark=name == _MARK) for name, theirs in names.items()]
    rows = (row._replace(mark=row.canonical in marks) for row in plain.rows)
    return dataclasses.replace(plain, rows=(*rows, *reverse))


_BEFORE = mamba.same(
    "patch_embed.weight", "patch_embed.bias", "cls_token", "cls_token_head", "cls_token_tail", "pos_embed"
)
_HEAD = mamba.same("head.weight", "head.bias")
_IMAGES, _CLASSES = ("patch_embed.weight", "pos_embed"), ("patch_embed.weight", "pos_embed", "head.weight")

# --- our own layout, which no library shares --------------------------------------------------------

_OWN = own_table("vision_mamba")
_CLASS = "VisionMamba"
# A tied language model has the names of one without a head. Of several that fit the last is taken; its config counts.
HF = dataclasses.replace(
    _OWN,
    schemes=tuple(
        dataclasses.replace(_scheme(task, mamba.LAYERS, outer, marks), classes=(_CLASS + name,))
        for task, name, outer, marks in (
            ("features", "Model", mamba.same(EMBEDDING, FINAL_NORM), (EMBEDDING,)),
            ("lm", "ForMaskedLM", mamba.HF_OUTER, (EMBEDDING,)),
            ("layers", "Layers", {}, ()),
            ("image_features", "ForImages", _BEFORE | mamba.same(FINAL_NORM), _IMAGES),
            ("image_classification", "ForImageClassification", _BEFORE | _HEAD | mamba.same(FINAL_NORM), _CLASSES),
        )
    ),
)

# --- hustvl/Vim ------------------------------------------------------------------------------------

_VIM_BEFORE = _BEFORE | {
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    FINAL_NORM: "norm_f.weight",
}


def _vim_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes by canonical name tell."""
    found = _blocks_sizes(shapes)
    options = {name: value for name, value in _options(shapes).items() if value != getattr(Task, name, None)}
    # The original's first form adds the directions.
    return found | {"divide_output": found["bimamba_type"] == "v2", "task_options": options}


def _options(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Those of the task.

    No tensor tells the size of the images and the stride. The published models are of images of 224 rows and columns,
    and their patches touch, or overlap by half. Others' patches are taken to touch, in an image that they fill.
    """
    _, channels, rows, columns = mamba.shape_of(shapes, "patch_embed.weight", "dcij")
    _, positions, _ = mamba.shape_of(shapes, "pos_embed", "1ld")
    place = next((name for name, tokens in NAMES.items() if tokens and set(tokens) <= set(shapes)), "none")
    options = {"channels": channels, "class_token": place, "patch_size": rows if rows == columns else (rows, columns)}
    if "head.weight" in shapes:
        options["num_classes"], _ = mamba.shape_of(shapes, "head.weight", "md")
    side = math.isqrt(patches := positions - len(NAMES[place]))
    if side * side != patches or rows != columns:
        return options
    strides = (stride for stride in (rows, rows // 2) if stride and (PUBLISHED - rows) // stride + 1 == side)
    if (stride := next(strides, None)) is None:
        return options | {"image_size": side * rows}
    return options | ({} if stride == rows else {"stride": stride})


VIM = Table(
    # That with a head comes last: its names are also those of a model without one.
    schemes=(
        _scheme("image_features", "layers", _VIM_BEFORE, _IMAGES),
        _scheme("image_classification", "layers", _VIM_BEFORE | _HEAD, _CLASSES),
    ),
    fields={
        "d_model": "embed_dim",
        "n_layer": "depth",
        "d_state": "d_state",
        "norm_eps": "norm_epsilon",
        "residual_in_fp32": "residual_in_fp32",
        "bimamba_type": "bimamba_type",
        "divide_output": "if_divide_out",
        "drop_path_rate": "drop_path_rate",
    },
    fixed={
        "rms_norm": (True,),
        "if_rope": (False,),
        "if_rope_residual": (False,),
        "if_bidirectional": (False,),
        "if_abs_pos_embed": (True,),
        "use_norm_after_ssm": (False,),
    },
    constants={"rms_norm": True, "if_abs_pos_embed": True},
    # What its Mamba takes where it is told nothing.
    required={"d_conv": 4, "expand": 2, "dt_rank": "auto", "bias": False, "conv_bias": True},
    unread={".mixer.gamma": "the model scales its layers (init_layer_scale), which is not read"},
    sizes=_vim_sizes,
    completed=mamba.library_completed,
)

# --- mambapy.vim, which has blocks alone -------------------------------------------------------------


def _blocks_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Those of the blocks."""
    own = f"{mamba.LAYERS}.0.mixer.conv1d_b.weight" in shapes
    found = {name: value for name, value in mamba.sizes(shapes).items() if name != "pad_vocab_size_multiple"}
    return found | {"bimamba_type": "v2" if own else "v1"}


MAMBAPY = dataclasses.replace(
    mamba.MAMBAPY,
    schemes=(_scheme("layers", "layers", {}, rate="mixer.A_log_b"),),
    fields={
        name: theirs
        for name, theirs in mamba.MAMBAPY.fields.items()
        if name not in ("initializer_range", "vocab_size", "pad_vocab_size_multiple")
    }
    | {"divide_output": Field("divide_output", True)},
    fixed={"inner_layernorms": (False,), "bidirectional": (True,)},
    constants={"bidirectional": True},
    unused=("pscan", "use_cuda", "d_inner"),
    required={"bimamba_type": "v2"},
    sizes=_blocks_sizes,
)

TABLES = {"hf": HF, "mambapy": MAMBAPY, "vim": VIM}
