"""Attention with a cache against the float64 reference: values and gradients by every route, and what finds no room."""

import inspect
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.selftest import CannotRunError
from mamba_core.spec.ops import attention as spec
from mamba_core.spec.ops.attention import KeyValueCache, Rotary

from .assertions import assert_close, assert_zero
from .compiling import vjp
from .test_ops import runnable

BATCH, LENGTH, HEADS, SIZE, CAPACITY = 3, 12, 4, 6, 20
FILLED = np.array([0, 3, 5], np.int32)


class Kind(NamedTuple):
    """groups: heads of keys and values. begun: whether there is a cache already."""

    groups: int
    begun: bool
    options: dict


KINDS = {
    "every head its own, nothing before": Kind(4, False, {}),
    "pairs of heads, halves turn": Kind(2, True, {"rotary": Rotary(4), "scale": 0.3}),
    "one head for all, neighbours turn": Kind(1, True, {"rotary": Rotary(6, 100.0, True)}),
}
# Padded on the left, on the right, and with holes; a sequence that comes again is another one.
MASK = np.ones((BATCH, LENGTH), bool)
MASK[0, :4] = MASK[1, 9:] = MASK[2, 2:9:3] = MASK[2, -1] = False
SEGMENTS = np.array([[0] * 5 + [1] * 3 + [0] * 4, [2] * 12, [0, 1] * 6], np.int32)
POSITIONS = {"all": {}, "padded": {"mask": MASK}, "packed": {"segment_ids": SEGMENTS}}
POSITIONS["padded and packed"] = POSITIONS["padded"] | POSITIONS["packed"]
SPLIT, STEPS = (0, 4, 4, 8, 12), (0, 8, 9, 10, 11, 12)


def drawn(kind: Kind, length: int = LENGTH, capacity: int = CAPACITY) -> tuple[dict, np.ndarray]:
    """(q, k, v, and the keys and values of the cache; how many of these there are)."""
    rng = np.random.default_rng(0)
    arrays = {"q": rng.normal(size=(BATCH, length, HEADS, SIZE))}
    arrays |= {name: rng.normal(size=(BATCH, length, kind.groups, SIZE)) for name in "kv"}
    filled = FILLED if kind.begun else np.zeros(BATCH, np.int32)
    there = (np.arange(capacity) < filled[:, None])[..., None, None]
    arrays |= {name: there * rng.normal(size=(BATCH, capacity, kind.groups, SIZE)) for name in ("keys", "values")}
    return {name: value.astype(np.float32) for name, value in arrays.items()}, filled


def followed(backend, filled, positions, options, bounds, kernel="auto"):
    """A function of the arrays: y of all calls that end at the bounds, and keys and values after the last."""
    native = {name: backend.from_numpy(value) for name, value in positions.items()}
    begun = backend.from_numpy(filled)
    attention = backend.op("attention").attention

    def run(q, k, v, keys, values):
        cache, found = KeyValueCache(keys, values, begun), []
        for start, stop in pairwise(bounds):
            here = {name: value[:, start:stop] for name, value in native.items()}
            parts = (value[:, start:stop] for value in (q, k, v))
            y, cache = attention(*parts, cache=cache, return_cache=True, **here, **options, kernel=kernel)
            found.append(y)
        return *found, cache.keys, cache.values

    return run


def check(backend, kind, positions, bounds, kernel="auto", dtype="float32"):
    arrays, filled = drawn(kind)
    native = [backend.from_numpy(value, dtype) for value in arrays.values()]
    arrays = {name: backend.to_numpy(value) for name, value in zip(arrays, native, strict=True)}
    q, k, v, keys, values = arrays.values()
    given = {"cache": KeyValueCache(keys, values, filled), **positions, **kind.options}
    y, cache = spec.attention(q, k, v, return_cache=True, **given)
    rng = np.random.default_rng(1)
    dy = rng.normal(size=y.shape)
    there = (np.arange(CAPACITY) < cache.filled[:, None])[..., None, None]
    dcache = [there * rng.normal(size=keys.shape) for _ in range(2)]
    run = followed(backend, filled, positions, kind.options, bounds, kernel)
    cotangents = [dy[:, start:stop] for start, stop in pairwise(bounds)] + dcache
    cotangents = [backend.from_numpy(np.ascontiguousarray(value, np.float32), dtype) for value in cotangents]
    dy, dcache = ([backend.to_numpy(value) for value in part] for part in (cotangents[:-2], cotangents[-2:]))
    wanted = spec.attention_vjp(np.concatenate(dy, axis=1), dcache, q, k, v, **given)
    found, gradients = vjp(backend, run, native, cotangents)
    assert_close(np.concatenate(found[:-2], axis=1), y, dtype, "value", f"{kernel}: y")
    for name, value, expected in zip(("keys", "values"), found[-2:], cache[:2], strict=True):
        assert_close(value, expected, dtype, "value", f"{kernel}: {name}")
    for name, gradient in zip(arrays, gradients, strict=True):
        if name in ("keys", "values"):  # what is not there has none
            gradient = np.where((np.arange(CAPACITY) < filled[:, None])[..., None, None], gradient, wanted[name])
        assert_close(gradient, wanted[name], dtype, "gradient", f"{kernel}: gradient of {name}")


def check_kernels(backend, kind, positions, dtype="float32"):
    """Every kernel of the device that takes this dtype and heads of this size."""
    ran = []
    for kernel in runnable(backend, "attention"):
        try:
            check(backend, kind, positions, (0, LENGTH), kernel, dtype)
        except CannotRunError:
            continue
        ran.append(kernel)
    assert "plain" in ran


def named(*pairs):
    return pytest.mark.parametrize(("kind", "where"), [(list(KINDS)[number], where) for number, where in pairs])


# Not every kind everywhere: each pair is a program that JAX compiles.
@named((0, "all"), (0, "packed"), (1, "padded"), (1, "packed"), (1, "padded and packed"), (2, "padded and packed"))
def test_the_whole(backend, kind, where):
    check_kernels(backend, KINDS[kind], POSITIONS[where])


@named((0, "padded"), (1, "all"), (2, "padded"))
def test_split_with_the_cache_that_is_carried(backend, kind, where):
    check(backend, KINDS[kind], POSITIONS[where], SPLIT)


@named((1, "all"), (2, "all"))
def test_position_by_position(backend, kind, where):
    check(backend, KINDS[kind], POSITIONS[where], STEPS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backend, dtype):
    check_kernels(backend, KINDS["pairs of heads, halves turn"], POSITIONS["padded"], dtype)


@pytest.mark.parametrize("where", ["all", "padded and packed"])
def test_without_a_cache(backend, where):
    """The cache that is asked for has room for all positions, and no more."""
    kind, positions = KINDS["pairs of heads, halves turn"], POSITIONS[where]
    q, k, v, *_ = drawn(kind)[0].values()
    y, cache = spec.attention(q, k, v, return_cache=True, **positions, **kind.options)
    native = {name: backend.from_numpy(value) for name, value in positions.items()}
    parts = [backend.from_numpy(value) for value in (q, k, v)]
    attention = backend.op("attention").attention
    alone = attention(*parts, **native, **kind.options)
    found, after = attention(*parts, return_cache=True, **native, **kind.options)
    for value in (alone, found):
        assert_close(backend.to_numpy(value), y, "float32", "value", "y")
    assert_zero(backend.to_numpy(found)[~positions.get("mask", np.ones(q.shape[:2], bool))], "masked")
    for name, value, expected in zip(cache._fields, after, cache, strict=True):
        assert_close(backend.to_numpy(value), expected, "float32", "value", name)


@pytest.mark.parametrize("bounds", [(0, 6), (0, 4, 5, 6)])
def test_what_finds_no_room_gives_no_number(backend, bounds):
    """Neither is it written, and the count goes on, so that it is known to be lost."""
    kind, capacity, length = KINDS["pairs of heads, halves turn"], 8, 6
    arrays, filled = drawn(kind, length, capacity)
    q, k, v, keys, values = arrays.values()
    pad = ((0, 0), (0, 12), (0, 0), (0, 0))
    more = KeyValueCache(np.pad(keys, pad), np.pad(values, pad), filled)
    y, cache = spec.attention(q, k, v, cache=more, return_cache=True, **kind.options)
    lost = filled[:, None] + np.arange(length) >= capacity
    assert lost.any(1).tolist() == [False, True, True]
    native = [backend.from_numpy(value) for value in arrays.values()]
    found = [backend.to_numpy(value) for value in followed(backend, filled, {}, kind.options, bounds)(*native)]
    outputs = np.concatenate(found[:-2], axis=1)
    assert np.isnan(outputs[lost]).all()
    assert_close(outputs[~lost], y[~lost], "float32", "value", "y")
    for name, value, expected in zip(("keys", "values"), found[-2:], cache[:2], strict=True):
        assert_close(value, expected[:, :capacity], "float32", "value", name)
    parts = [backend.from_numpy(value) for value in (q, k, v)]
    given = KeyValueCache(*native[3:], backend.from_numpy(filled))
    _, after = backend.op("attention").attention(*parts, cache=given, return_cache=True)
    assert backend.to_numpy(after.filled).tolist() == (filled + length).tolist()
    with pytest.raises(ValueError, match="cache has room for 8 positions; expected room for 11"):
        mc.attention(q, k, v, cache=KeyValueCache(keys, values, filled))


def test_a_sequence_that_has_ended_needs_no_room(backend):
    kind = KINDS["pairs of heads, halves turn"]
    arrays, filled = drawn(kind, capacity=8)
    segments = np.repeat([[0, 1]], [9, 3], axis=1).repeat(BATCH, axis=0).astype(np.int32)
    q, k, v, keys, values = arrays.values()
    y = spec.attention(q, k, v, cache=KeyValueCache(keys, values, filled), segment_ids=segments, **kind.options)
    native = [backend.from_numpy(value) for value in arrays.values()]
    found, *_ = followed(backend, filled, {"segment_ids": segments}, kind.options, (0, LENGTH))(*native)
    assert_close(backend.to_numpy(found), y, "float32", "value", "y")


def test_masked_positions_do_not_leak_what_is_not_finite(backend):
    """Into no value, no cache and no gradient."""
    kind = KINDS["pairs of heads, halves turn"]
    arrays, filled = drawn(kind)
    spoilt = {name: np.where(MASK[..., None, None], arrays[name], np.float32("nan")) for name in "qkv"}
    run = followed(backend, filled, {"mask": MASK}, kind.options, (0, LENGTH))
    shapes = [(BATCH, LENGTH, HEADS, SIZE), *[arrays["keys"].shape] * 2]
    ones = [backend.from_numpy(np.ones(shape, np.float32)) for shape in shapes]
    (values, gradients), (clean, expected) = (
        vjp(backend, run, [backend.from_numpy(value) for value in given.values()], ones)
        for given in (arrays | spoilt, arrays)
    )
    for value, wanted in zip([*values, *gradients], [*clean, *expected], strict=True):
        np.testing.assert_array_equal(value, wanted)
    for name, gradient in zip("qkv", gradients, strict=False):
        assert_zero(gradient[~MASK], f"gradient of {name}")


def test_a_row_is_what_it_is_alone(backend):
    """Whatever its neighbours have in the cache, and however they are padded."""
    kind = KINDS["pairs of heads, halves turn"]
    arrays, filled = drawn(kind)
    y, *_ = followed(backend, filled, {"mask": MASK}, kind.options, (0, LENGTH))(
        *[backend.from_numpy(value) for value in arrays.values()]
    )
    at = np.flatnonzero(MASK[2])
    alone = [backend.from_numpy(arrays[name][2:, at if name in "qkv" else slice(None)]) for name in arrays]
    wanted, *_ = followed(backend, filled[2:], {}, kind.options, (0, len(at)))(*alone)
    assert_close(backend.to_numpy(y)[2:, at], backend.to_numpy(wanted), "float32", "value", "y")


def test_no_positions(backend):
    kind = KINDS["pairs of heads, halves turn"]
    arrays, filled = drawn(kind, length=0)
    native = [backend.from_numpy(value) for value in arrays.values()]
    y, keys, values = followed(backend, filled, {}, kind.options, (0, 0))(*native)
    assert y.shape == (BATCH, 0, HEADS, SIZE)
    np.testing.assert_array_equal(backend.to_numpy(keys), arrays["keys"])
    np.testing.assert_array_equal(backend.to_numpy(values), arrays["values"])


def test_one_signature(backend):
    def arguments(function):
        return [(item.name, item.kind, item.default) for item in inspect.signature(function).parameters.values()]

    wanted = arguments(mc.attention)
    assert arguments(backend.op("attention").attention) == wanted
    assert arguments(spec.attention) == wanted[:-1]
    assert (wanted[-1][0], wanted[-1][2]) == ("kernel", "auto")


FAULTS = {
    "groups": ({"k": (3, 12, 3, 6), "v": (3, 12, 3, 6)}, {}, ValueError, "q has 4 heads and k 3"),
    "keys": ({"k": (3, 12, 2, 5)}, {}, ValueError, "k has shape"),
    "values": ({"v": (3, 11, 2, 6)}, {}, ValueError, "v has shape"),
    "no rows": ({"q": (0, 12, 4, 6)}, {}, ValueError, "batch 0"),
    "cache": ({"keys": (3, 20, 4, 6)}, {}, ValueError, r"cache\.keys has shape"),
    "rotary": ({}, {"rotary": Rotary(3)}, ValueError, r"rotary\.size is 3; expected an even number"),
    "scale": ({}, {"scale": float("nan")}, ValueError, "scale is nan"),
    "kernel": ({}, {"kernel": "nonsense"}, ValueError, "no kernel 'nonsense'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_arguments_are_named(backend, name):
    shapes, options, error, message = FAULTS[name]
    arrays, filled = drawn(KINDS["pairs of heads, halves turn"])
    arrays = {key: np.ones(shapes[key], np.float32) if key in shapes else value for key, value in arrays.items()}
    q, k, v, keys, values = (backend.from_numpy(value) for value in arrays.values())
    with pytest.raises(error, match=message):
        backend.op("attention").attention(
            q, k, v, cache=KeyValueCache(keys, values, backend.from_numpy(filled)), **options
        )
