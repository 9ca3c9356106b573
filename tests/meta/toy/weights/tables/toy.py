"""The toy in the layout of transformers, under names of its own for the layers."""

from mamba_core.architectures.base import BaseConfig
from mamba_core.weights.names import EMBEDDING, FINAL_NORM, HEAD
from mamba_core.weights.tables.base import Field, Row, Scheme, Table

LAYER = "backbone.layers.{layer}."
NAMES = (
    *("norm.weight", "norm2.weight", "mixer.decay", "feed_forward.up.weight", "feed_forward.down.weight"),
    *("mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.conv1d.weight"),
    *("mixer.conv1d.bias", "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias"),
    *("mixer.out_proj.weight", "mixer.out_proj.bias"),
)


def rows(prefix: str) -> tuple[Row, ...]:
    """prefix: of every name but the head's; a model without a head has none, as in transformers."""
    return (
        Row(EMBEDDING, prefix + "embed.weight", mark=True),
        *(Row(LAYER + name, f"{prefix}blocks.{{layer}}.{name}", mark=name == "norm.weight") for name in NAMES),
        Row(FINAL_NORM, prefix + "norm.weight"),
    )


SAME = ("d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias", "norm_eps", "residual_in_fp32", "pattern")
TABLES = {
    "hf": Table(
        schemes=(
            Scheme("lm", (*rows("toy."), Row(HEAD, "head.weight")), ("ToyForCausalLM",)),
            Scheme("features", rows(""), ("ToyModel",)),
        ),
        fields={name: name for name in SAME}
        | {"d_model": Field("hidden_size", 8), "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}
        | {"tie_embeddings": Field("tie_word_embeddings", BaseConfig.tie_embeddings)},
        kinds=("toy",),
    )
}
