"""Task "layers": the residual stream from embeddings, without an embedding and a final norm."""

from mamba_core.backends.mlx.heads.features import FeatureModel

Model = FeatureModel
