"""Task "image_features": see `mamba_core.tasks.image_features`."""

import mlx.core as mx

from mamba_core.backends.mlx import images as parts
from mamba_core.backends.mlx.heads import features
from mamba_core.kernels import Kernels
from mamba_core.observe import Report


class ImageModel(features.FeatureModel):
    """The backbone's output at the patches and the class tokens of images."""

    def __init__(self, config, policy: Kernels, device: str):
        super().__init__(config, policy, device)
        parts.add_parameters(self)

    def _opened(self, inputs: mx.array, observe: Report) -> mx.array:
        return parts.embed(self, inputs, observe)


Model = ImageModel
