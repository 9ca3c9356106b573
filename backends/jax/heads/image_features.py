"""Task "image_features": see `mamba_core.tasks.image_features`."""

import jax

from mamba_core.backends.jax import images as parts
from mamba_core.backends.jax.heads import features
from mamba_core.backends.jax.mixers import Options
from mamba_core.observe import Report


class ImageModel(features.FeatureModel):
    """The backbone's output at the patches and the class tokens of images."""

    def __init__(self, config, options: Options):
        super().__init__(config, options)
        parts.add_parameters(self, options)

    def _opened(self, inputs: jax.Array, observe: Report) -> jax.Array:
        return parts.embed(self, inputs, observe)


Model = ImageModel
