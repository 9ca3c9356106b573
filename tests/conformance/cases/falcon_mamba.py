"""Small models of FalconMamba."""

from mamba_core.architectures.falcon_mamba import FalconMambaConfig

from . import mamba

CONFIGS = {
    "base": FalconMambaConfig(d_model=16, n_layer=2, vocab_size=29, d_state=4, initializer_range=0.3),
    "odd": FalconMambaConfig(
        d_model=12, n_layer=2, vocab_size=31, d_state=3, d_conv=3, expand=3, dt_rank=5, bias=True, conv_bias=False,
        tie_embeddings=False, pad_vocab_size_multiple=16, residual_in_fp32=False, initializer_range=0.3, norm_eps=1e-3,
        mixer_rms_eps=1e-3,
    ),
}  # fmt: skip


def draw(choose, **fixed) -> FalconMambaConfig:
    return mamba.draw(choose, FalconMambaConfig, **{"mixer_rms_eps": choose((1e-6, 1e-3))} | fixed)
