"""Task "layers": inputs_embeds to the residual stream after the last block."""

from mamba_core.backends.jax.heads.features import FeatureModel

Model = FeatureModel
