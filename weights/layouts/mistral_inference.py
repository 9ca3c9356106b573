"""mistral-inference, in whose files Mamba-Codestral was published first: mamba_ssm's model inside of another.

https://github.com/mistralai/mistral-inference, src/mistral_inference/mamba.py. Its config takes no fields that it does
not know.
"""

from mamba_core.weights.layouts.base import Layout

LAYOUT = Layout(
    file_format="consolidated",
    config_file="params.json",
    weights_file="consolidated.safetensors",
    keys=("dim",),
    dialect=("dim",),
    kind=("model_type",),
    keeps_unknown=False,
    writes_tied_head=True,
)
