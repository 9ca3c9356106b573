"""Hugging Face transformers. Its loader keeps fields that it does not know, so that ours are written beside its own."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="safetensors",
    module="transformers",
    keys=("model_type", "hidden_size"),
    dialect=("hidden_size", "model_type"),
    kind=("model_type",),
    classes="architectures",
    dtype=("torch_dtype", "dtype"),
    hides="always",
    counts_rows=True,
    holds_every_task=True,
)
