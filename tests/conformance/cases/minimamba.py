"""Small models of MiniMamba."""

from mamba_core.architectures.minimamba import MiniMambaConfig

from . import mamba

CONFIGS = {
    "base": MiniMambaConfig(d_model=12, n_layer=2, vocab_size=29, d_state=3, initializer_range=0.3),
    "odd": MiniMambaConfig(
        d_model=12, n_layer=2, vocab_size=29, d_state=3, bias=True, conv_bias=False, residual_in_fp32=False,
        initializer_range=0.3,
    ),
}  # fmt: skip


def draw(choose, **fixed) -> MiniMambaConfig:
    return mamba.draw(choose, MiniMambaConfig, **fixed)
