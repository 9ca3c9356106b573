"""What the conformance suite draws: arguments of the ops, masks, segments, configs and small models, all as NumPy."""

import functools
import inspect
import os
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_core.config import MambaConfig

# Where off-by-one faults live: nothing, shorter than the convolution's window, and on either side of a kernel's chunk.
EDGES = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257)
SHORT = (0, 1, 2, 3, 15, 16, 17, 33)


def law(test):
    """A property of drawn data, tried on a fifth of the examples where every new shape is compiled.

    $EXAMPLES, where it is set, is the number on every backend.
    """
    many = settings.default.max_examples
    few = many if "EXAMPLES" in os.environ else max(3, many // 5)
    tried = {count: settings(max_examples=count)(given(data=st.data())(test)) for count in (many, few)}

    @functools.wraps(test)
    def run(**fixtures):
        return tried[few if fixtures["backend"].name == "jax" else many](**fixtures)

    signature = inspect.signature(test)
    drawn = [parameter for name, parameter in signature.parameters.items() if name != "data"]
    run.__signature__ = signature.replace(parameters=drawn)
    return run


class Case(NamedTuple):
    """The arguments of an op: arrays are differentiated, positions (mask, segment_ids) and options are not.

    strides: name -> how its array lies in memory, as `laid_out` takes it. dtype: the compute dtype.
    """

    arrays: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]
    options: dict
    strides: dict[str, str]
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int]:
        """(b, l)."""
        whole = self.arrays.get("x", self.arrays.get("inputs_embeds", self.options.get("input_ids")))
        return whole.shape[:2]


def lengths(longest: int = 300) -> st.SearchStrategy[int]:
    return st.sampled_from([edge for edge in EDGES if edge <= longest]) | st.integers(0, longest)


@st.composite
def scan_cases(draw, lengths=lengths()) -> Case:  # noqa: B008 (a strategy is a value)
    """Arguments of `selective_scan`, each optional one present or not; step sizes from 1e-6 to 20."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(lengths)
    e, n = draw(st.sampled_from((1, 5, 8, 67))), draw(st.sampled_from((1, 2, 3, 7, 16, 33, 64)))
    softplus = draw(st.booleans())
    arrays = {"x": rng.normal(size=(b, l, e)), "delta": _steps(rng, (b, l, e), softplus)}
    arrays |= {"A": -np.exp(rng.normal(size=(e, n))), "B": rng.normal(size=(b, l, n)), "C": rng.normal(size=(b, l, n))}
    optional = {"D": (e,), "z": (b, l, e), "delta_bias": (e,), "initial_state": (b, e, n)}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(optional))))):
        if name == "delta_bias":  # without the softplus the sum must stay a positive step
            arrays[name] = rng.normal(size=e) if softplus else rng.uniform(0, 1, e)
        else:
            arrays[name] = rng.normal(size=optional[name])
    return _case(draw, arrays, (b, l), {"delta_softplus": softplus})


@st.composite
def conv_cases(draw, lengths=lengths()) -> Case:  # noqa: B008
    """Arguments of `causal_conv`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, l = draw(st.sampled_from((1, 2, 3))), draw(lengths)
    e, k = draw(st.sampled_from((1, 5, 8, 67))), draw(st.sampled_from((1, 2, 3, 4)))
    arrays = {"x": rng.normal(size=(b, l, e)), "weight": rng.normal(size=(e, k))}
    optional = {"bias": (e,), "initial_state": (b, k - 1, e)}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(optional))))):
        arrays[name] = rng.normal(size=optional[name])
    return _case(draw, arrays, (b, l), {"activation": draw(st.sampled_from((None, "silu")))})


def _case(draw, arrays, shape, options) -> Case:
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return Case(arrays, draw(positions(*shape)), options, draw(strides(arrays)))


def strides(arrays) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries({name: st.sampled_from(("plain", "every second", "swapped")) for name in arrays})


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


@st.composite
def configs(draw, **fixed) -> MambaConfig:
    """Small configs with every size and switch drawn, those of `fixed` apart."""
    sizes = {"d_model": (8, 12, 16), "n_layer": (1, 2), "vocab_size": (17, 32, 41), "d_state": (1, 3, 4, 16, 64)}
    sizes |= {"d_conv": (2, 3, 4), "expand": (1, 2, 3), "dt_rank": ("auto", 1, 5), "norm_eps": (1e-5, 1e-3)}
    sizes |= {"pad_vocab_size_multiple": (1, 8, 16), "compat": (None, None, "minimamba")}
    switches = ("bias", "conv_bias", "tie_embeddings", "residual_in_fp32")
    drawn = {name: draw(st.sampled_from(values)) for name, values in sizes.items() if name not in fixed}
    drawn |= {name: draw(st.booleans()) for name in switches}
    return MambaConfig(**drawn, initializer_range=0.3, **fixed)


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


def laid_out(backend, value: np.ndarray, strides: str, dtype: str | None = None):
    """The value as an array of the backend that lies in memory as `strides` says, where the framework has strides."""
    if strides == "every second":
        return backend.from_numpy(np.repeat(value, 2, axis=-1), dtype=dtype)[..., ::2]
    if strides == "swapped" and value.ndim > 1:
        return backend.from_numpy(np.ascontiguousarray(value.swapaxes(0, 1)), dtype=dtype).swapaxes(0, 1)
    return backend.from_numpy(value, dtype=dtype)


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
