"""MiniMamba, which saves a state dict, and a config that takes no fields that it does not know."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="pt",
    module="minimamba.config",
    keys=("norm_epsilon", "d_model"),
    keeps_unknown=False,
    sized_by_tensors=True,
    writes_tied_head=True,
)
