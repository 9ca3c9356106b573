"""Small models of Vision Mamba's blocks, of tokens; those of images are in `test_images.py`."""

from mamba_core.architectures.vision_mamba import VisionMambaConfig

from . import mamba

SMALL = {"vocab_size": 29, "n_layer": 2, "initializer_range": 0.3, "task": "lm"}
CONFIGS = {
    "base": VisionMambaConfig(d_model=16, d_state=4, **SMALL),
    "odd": VisionMambaConfig(
        d_model=12, d_state=3, d_conv=3, expand=3, dt_rank=5, bias=True, conv_bias=False, tie_embeddings=False,
        residual_in_fp32=False, norm_eps=1e-3, bimamba_type="v1", divide_output=False, **SMALL | {"n_layer": 1},
    ),
}  # fmt: skip

MODEL = False


def draw(choose, **fixed) -> VisionMambaConfig:
    drawn = {"bimamba_type": choose(("v1", "v2")), "divide_output": choose((False, True))}
    return mamba.draw(choose, VisionMambaConfig, **drawn | fixed)
