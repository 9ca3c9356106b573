"""Small models of both directions of other architectures."""

from mamba_core.architectures.bidirectional import BidirectionalConfig

SMALL = {"vocab_size": 29, "initializer_range": 0.3}
CONFIGS = {
    "mamba2": BidirectionalConfig(
        d_model=12, n_layer=1, inner="mamba2", inner_options={"d_state": 3, "headdim": 4, "ngroups": 2},
        residual_in_fp32=False, tie_embeddings=False, merge="sum", **SMALL,
    ),
}  # fmt: skip
INNER = {
    "mamba": {"d_state": 3},
    "minimamba": {"d_state": 3, "conv_bias": False},
    "falcon_mamba": {"d_state": 4, "bias": True},
    "mamba2": {"d_state": 3, "headdim": 4},
}

MODEL = False


def draw(choose, **fixed) -> BidirectionalConfig:
    inner = choose(tuple(INNER))
    drawn = {"n_layer": choose((1, 2)), "inner": inner, "inner_options": INNER[inner], "merge": choose(("mean", "sum"))}
    return BidirectionalConfig(**{"d_model": 8, **SMALL, **drawn, **fixed})
