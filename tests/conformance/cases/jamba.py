"""Small Jambas.

Where some experts are left out, rounding in half precision chooses others: models compute all of theirs here, and
test_experts.py has those that choose.
"""

from mamba_core.architectures.jamba import JambaConfig

# An RMS norm of a single value is its sign, which rounding turns: dt, B and C have more.
SMALL = {"d_state": 4, "dt_rank": 3, "initializer_range": 0.3, "num_heads": 4, "num_kv_heads": 2, "d_intermediate": 12}
CONFIGS = {
    "base": JambaConfig(
        d_model=16, n_layer=3, vocab_size=29, attn_layer_period=3, attn_layer_offset=1, num_experts=3,
        num_experts_per_tok=3, **SMALL,
    ),
    "attention first": JambaConfig(
        d_model=8, n_layer=2, vocab_size=17, attn_layer_period=2, attn_layer_offset=0, num_experts=1,
        num_experts_per_tok=1, tie_embeddings=True, d_conv=3, bias=True, conv_bias=False, norm_eps=1e-3,
        residual_in_fp32=True, pad_vocab_size_multiple=8, **SMALL | {"num_kv_heads": 4},
    ),
}  # fmt: skip

SIZES = {
    "d_model": (8, 16),
    "n_layer": (1, 2, 3),
    "vocab_size": (17, 32),
    "d_state": (3, 16),
    "d_conv": (2, 4),
    "num_kv_heads": (1, 2, 4),
    "d_intermediate": (3, 16),
    "norm_eps": (1e-6, 1e-3),
    **dict.fromkeys(("bias", "conv_bias", "tie_embeddings", "residual_in_fp32"), (False, True)),
}


def draw(choose, **fixed) -> JambaConfig:
    drawn = {name: choose(values) for name, values in SIZES.items() if name not in fixed}
    period, experts = choose((1, 2, 3)), choose((1, 2))
    drawn |= {"attn_layer_period": period, "attn_layer_offset": choose(range(period))}
    drawn |= {"num_experts": experts, "num_experts_per_tok": experts, "num_heads": 4}
    return JambaConfig(**SMALL | drawn | fixed)
