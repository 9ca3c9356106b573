"""Task "image_features": see `mamba_core.tasks.image_features`."""

from torch import Tensor

from mamba_core.backends.torch import images as parts
from mamba_core.backends.torch.heads import features
from mamba_core.kernels import Kernels
from mamba_core.observe import Report


class ImageModel(features.FeatureModel):
    """The backbone's output at the patches and the class tokens of images."""

    def __init__(self, config, policy: Kernels):
        super().__init__(config, policy)
        parts.add_parameters(self)

    def _opened(self, inputs: Tensor, observe: Report) -> Tensor:
        return parts.embed(self, inputs, observe)


Model = ImageModel
