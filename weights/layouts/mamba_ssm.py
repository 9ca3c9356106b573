"""mamba_ssm's MambaLMHeadModel. Its config takes no fields that it does not know."""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="bin",
    module="mamba_ssm.models",
    keys=("ssm_cfg", "d_model"),
    dialect=("ssm_cfg", "fused_add_norm", "rms_norm"),
    kind=("ssm_cfg", "layer"),
    nested="ssm_cfg",
    keeps_unknown=False,
    writes_tied_head=True,
)
