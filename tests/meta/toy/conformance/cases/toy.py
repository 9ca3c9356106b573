"""Small toys."""

from mamba_core import discovery

ToyConfig = discovery.find("architectures", "toy").ToyConfig
SMALL = {"d_model": 8, "vocab_size": 17, "d_state": 4, "initializer_range": 0.3}
CONFIGS = {
    "all kinds": ToyConfig(n_layer=4, pattern="mshm", **SMALL),
    "sums": ToyConfig(n_layer=1, pattern="s", residual_in_fp32=False, tie_embeddings=False, **SMALL),
    "histories": ToyConfig(n_layer=2, pattern="h", **SMALL),
}


def draw(choose, **fixed):
    pattern = choose(("s", "h", "m", "shm"))
    drawn = {"n_layer": choose((1, 2, 3)), "residual_in_fp32": choose((False, True)), "pattern": pattern}
    return ToyConfig(**SMALL | drawn | fixed)
