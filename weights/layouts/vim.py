"""hustvl/Vim, which saves a training checkpoint with the weights under "model"."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="pth",
    keys=("embed_dim",),
    dialect=("embed_dim",),
    hides="changed",
    sized_by_tensors=True,
)
