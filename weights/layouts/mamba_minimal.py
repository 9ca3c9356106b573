"""mamba-minimal, which saves a state dict alone and reads three fields of mamba_ssm's config."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="pt",
    keys=("ssm_cfg", "d_model"),
    kind=("ssm_cfg", "layer"),
    nested="ssm_cfg",
    hides="changed",
    shadows=True,
    sized_by_tensors=True,
    writes_tied_head=True,
)
