"""mlx-lm: the configs and names of transformers, with convolutions that have their channels last."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="safetensors",
    metadata_format="mlx",
    told_by_format=True,
    keys=("model_type", "hidden_size"),
    kind=("model_type",),
    classes="architectures",
    dtype=("torch_dtype", "dtype"),
    hides="always",
    counts_rows=True,
)
