"""MiniMamba's names over ours; see the table in mamba_core/compat/README.md."""

from mamba_core.compat.minimamba.config import (
    BaseMambaConfig,
    InferenceParams,
    MambaClassificationConfig,
    MambaConfig,
    MambaLMConfig,
)
from mamba_core.compat.minimamba.core import MambaBlock, MambaEncoder, RMSNorm
from mamba_core.compat.minimamba.models import (
    Mamba,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
)
from mamba_core.compat.wrapped import refuse

__all__ = [
    "BaseMambaConfig",
    "InferenceParams",
    "Mamba",
    "MambaBlock",
    "MambaClassificationConfig",
    "MambaConfig",
    "MambaEncoder",
    "MambaForCausalLM",
    "MambaForFeatureExtraction",
    "MambaForSequenceClassification",
    "MambaLMConfig",
    "RMSNorm",
]
_WHOLE = "its layers are inside a model of ours here; take MambaEncoder, or a whole model"
__getattr__ = refuse(
    __name__,
    {
        **dict.fromkeys(("S6", "MambaEmbedding", "MambaLMHead", "MambaClassificationHead"), _WHOLE),
        "MambaLegacy": "take Mamba, which reads its checkpoints too",
    },
)
