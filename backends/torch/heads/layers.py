"""Task "layers": see `mamba_core.backend.Backend.build`."""

from mamba_core.backends.torch.heads.features import FeatureModel

Model = FeatureModel
