"""Small Mamba-1 models."""

from mamba_core.architectures.mamba import MambaConfig

CONFIGS = {
    "base": MambaConfig(d_model=16, n_layer=2, vocab_size=29, d_state=4, initializer_range=0.3),
    "odd": MambaConfig(
        d_model=12, n_layer=2, vocab_size=31, d_state=3, d_conv=3, expand=3, dt_rank=5, bias=True, conv_bias=False,
        tie_embeddings=False, pad_vocab_size_multiple=16, residual_in_fp32=False, initializer_range=0.3, norm_eps=1e-3,
    ),
    "narrow": MambaConfig(
        d_model=8, n_layer=1, vocab_size=17, d_state=1, d_conv=2, expand=1, pad_vocab_size_multiple=1,
        initializer_range=0.3,
    ),
}  # fmt: skip

SIZES = {
    "d_model": (8, 12, 16),
    "n_layer": (1, 2),
    "vocab_size": (17, 32, 41),
    "d_state": (1, 3, 4, 16, 64),
    "d_conv": (2, 3, 4),
    "expand": (1, 2, 3),
    "dt_rank": ("auto", 1, 5),
    "norm_eps": (1e-5, 1e-3),
    "pad_vocab_size_multiple": (1, 8, 16),
    **dict.fromkeys(("bias", "conv_bias", "tie_embeddings", "residual_in_fp32"), (False, True)),
}


def draw(choose, kind: type[MambaConfig] = MambaConfig, **fixed) -> MambaConfig:
    drawn = {name: choose(values) for name, values in SIZES.items() if name not in fixed}
    return kind(**drawn, initializer_range=0.3, **fixed)
