"""What the conformance suite draws: arguments of the ops, masks, segments and small models, all as NumPy.

Sizes come from short lists, because a compiling backend compiles for every shape.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from mamba_core.config import MambaConfig

# Around the chunk sizes of the kernels and of the convolution's window, where off-by-one faults live.
LENGTHS = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)


class Case(NamedTuple):
    """The arguments of an op: arrays are differentiated, positions (mask, segment_ids) and options are not."""

    arrays: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]
    options: dict

    @property
    def length(self) -> int:
        return self.arrays["x"].shape[1]


@st.composite
def scan_cases(draw, lengths=LENGTHS) -> Case:
    """Arguments of `selective_scan`, each optional one present or not; step sizes from 1e-6 to 20."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(lengths))
    e, n = draw(st.sampled_from((1, 5, 8))), draw(st.sampled_from((1, 3, 16)))
    softplus = draw(st.booleans())
    arrays = {"x": rng.normal(size=(b, l, e)), "delta": _steps(rng, (b, l, e), softplus)}
    arrays |= {"A": -np.exp(rng.normal(size=(e, n))), "B": rng.normal(size=(b, l, n)), "C": rng.normal(size=(b, l, n))}
    optional = {"D": (e,), "z": (b, l, e), "delta_bias": (e,), "initial_state": (b, e, n)}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(optional))))):
        if name == "delta_bias":  # without the softplus the sum must stay a positive step
            arrays[name] = rng.normal(size=e) if softplus else rng.uniform(0, 1, e)
        else:
            arrays[name] = rng.normal(size=optional[name])
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return Case(arrays, draw(positions(b, l)), {"delta_softplus": softplus})


@st.composite
def conv_cases(draw, lengths=LENGTHS) -> Case:
    """Arguments of `causal_conv`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(lengths))
    e, k = draw(st.sampled_from((1, 5, 8))), draw(st.sampled_from((1, 2, 3, 4)))
    arrays = {"x": rng.normal(size=(b, l, e)), "weight": rng.normal(size=(e, k))}
    optional = {"bias": (e,), "initial_state": (b, k - 1, e)}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(optional))))):
        arrays[name] = rng.normal(size=optional[name])
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return Case(arrays, draw(positions(b, l)), {"activation": draw(st.sampled_from((None, "silu")))})


@st.composite
def positions(draw, b: int, l: int) -> dict[str, np.ndarray]:
    """A mask and segment ids, each present or not. Masks pad on the left, the right or both, or have holes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drawn = {}
    if draw(st.booleans()):
        drawn["mask"] = draw(st.sampled_from((_padding, _holes)))(rng, b, l)
    if draw(st.booleans()):
        drawn["segment_ids"] = np.cumsum(rng.random((b, l)) < 0.15, axis=1).astype(np.int32)
    return drawn


CONFIGS = {
    "base": MambaConfig(d_model=16, n_layer=2, vocab_size=29, d_state=4, initializer_range=0.3),
    "odd": MambaConfig(
        d_model=12, n_layer=2, vocab_size=31, d_state=3, d_conv=3, expand=3, dt_rank=5, bias=True, conv_bias=False,
        tie_embeddings=False, pad_vocab_size_multiple=16, residual_in_fp32=False, initializer_range=0.3, norm_eps=1e-3,
    ),
    "narrow": MambaConfig(
        d_model=8, n_layer=1, vocab_size=17, d_state=1, d_conv=2, expand=1, dt_rank=1, pad_vocab_size_multiple=1,
        initializer_range=0.3,
    ),
}  # fmt: skip


def tokens(config: MambaConfig, b: int, l: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (b, l)).astype(np.int32)


def _steps(rng, shape, softplus):
    step = np.exp(rng.uniform(np.log(1e-6), np.log(20.0), shape))
    return step + np.log(-np.expm1(-step)) if softplus else step


def _padding(rng, b, l):
    left = rng.integers(0, l + 1, b)
    right = rng.integers(0, l + 1, b) if rng.random() < 0.5 else np.full(b, l)
    at = np.arange(l)
    return (at >= np.minimum(left, right)[:, None]) & (at < np.maximum(left, right)[:, None])


def _holes(rng, b, l):
    return rng.random((b, l)) < 0.7
