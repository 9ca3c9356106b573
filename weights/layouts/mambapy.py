"""mambapy, which saves a state dict alone."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="pt",
    module="mambapy",
    keys=("n_layers",),
    hides="changed",
    shadows=True,
    sized_by_tensors=True,
    writes_tied_head=True,
)
