"""Small Mamba-2 models."""

from mamba_core.architectures.mamba2 import Mamba2Config

CONFIGS = {
    "base": Mamba2Config(d_model=16, n_layer=2, vocab_size=29, d_state=4, headdim=8, initializer_range=0.3),
    "odd": Mamba2Config(
        d_model=12, n_layer=2, vocab_size=31, d_state=3, d_conv=3, expand=3, headdim=3, d_ssm=24, ngroups=4, bias=True,
        conv_bias=False, norm_before_gate=True, D_has_hdim=True, dt_limit=(0.01, 0.2), tie_embeddings=False,
        pad_vocab_size_multiple=16, residual_in_fp32=False, initializer_range=0.3, norm_eps=1e-3, conv_init=0.2,
    ),
    "bare": Mamba2Config(
        d_model=8, n_layer=1, vocab_size=17, d_state=1, d_conv=2, expand=1, headdim=1, ngroups=2, rmsnorm=False,
        pad_vocab_size_multiple=1, initializer_range=0.3,
    ),
}  # fmt: skip

SIZES = {
    "d_model": (8, 16),
    "n_layer": (1, 2),
    "vocab_size": (17, 32, 41),
    "d_state": (1, 3, 16),
    "d_conv": (2, 3, 4),
    "expand": (1, 2, 3),
    "headdim": (1, 2, 4),
    "ngroups": (1, 2),
    "d_ssm": (None, 8),
    "dt_limit": ((0.0, float("inf")), (0.01, 0.2)),
    "norm_eps": (1e-5, 1e-3),
    "pad_vocab_size_multiple": (1, 8, 16),
    **dict.fromkeys(("bias", "conv_bias", "tie_embeddings", "residual_in_fp32"), (False, True)),
    **dict.fromkeys(("rmsnorm", "norm_before_gate", "D_has_hdim"), (False, True)),
}


def draw(choose, **fixed) -> Mamba2Config:
    drawn = {name: choose(values) for name, values in SIZES.items() if name not in fixed}
    return Mamba2Config(**drawn, initializer_range=0.3, **fixed)
