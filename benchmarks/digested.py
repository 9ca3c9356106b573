"""What `digests` compares: every result of one backend as a digest of its bytes.

    python -m mamba_core.benchmarks.digested --backend torch --out FILE [--only TEXT]

Runs on other commits too, so it keeps to what a user may call. All inputs and initial values are seeded. JAX computes
less than the others: compiling it takes a hundred times as long as computing it.
"""

import argparse
import functools
import hashlib
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import mamba_core as mc
from mamba_core import registry
from mamba_core.benchmarks import calls

DTYPES = ("float32", "bfloat16")
# Random vectors that an array is multiplied by. They give the distance of two arrays within a third or so.
PROJECTIONS = 8
BATCH, LENGTH = 3, 41
# Where the calls of a carried state end.
ENDS = (7, 8, 30)


def minimamba(**sizes):
    """MiniMamba's arithmetic, in either way of asking for it."""
    if hasattr(mc, "MiniMambaConfig"):
        return mc.MiniMambaConfig(**sizes)
    return mc.MambaConfig(compat="minimamba", **sizes)


SMALL = mc.MambaConfig(d_model=64, n_layer=3, vocab_size=256, initializer_range=0.3)
CONFIGS = {
    "small": SMALL,
    "odd": mc.MambaConfig(
        d_model=21,
        n_layer=2,
        vocab_size=101,
        d_state=5,
        d_conv=3,
        expand=1.5,
        dt_rank=3,
        bias=True,
        norm_eps=1e-4,
        residual_in_fp32=False,
        tie_embeddings=False,
        pad_vocab_size_multiple=3,
        initializer_range=0.3,
    ),
    "minimamba": minimamba(d_model=32, n_layer=2, vocab_size=64, initializer_range=0.3),
}
TASK_SIZES = {"d_model": 32, "n_layer": 2, "vocab_size": 64, "initializer_range": 0.3}
# Every backend computes a block of it in two pieces.
WIDE, WIDE_BATCH, WIDE_LENGTH = mc.MambaConfig(d_model=256, n_layer=2, vocab_size=64, task="features"), 8, 700

# What JAX computes of the scans (dtype, kernel), and of the models but the small one (work, config).
BRIEF_SCANS = [("float32", "native"), ("float32", "chunked"), ("float32", "associative"), ("float32", "sequential")]
BRIEF_SCANS += [("bfloat16", "native"), ("bfloat16", "chunked")]
BRIEF_WORKS = [("positions", "odd"), ("positions", "minimamba"), ("loss gradients", "odd")]
BRIEF_WORKS += [("loss gradients", "minimamba"), ("training", "odd")]

Named = Iterator[tuple[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="the works whose names have this text in them")
    parser.add_argument("--seconds", action="store_true", help="print what each work takes")
    arguments = parser.parse_args()
    found = {}
    for work, results in works(arguments.backend).items():
        if arguments.only not in work:
            continue
        began = time.perf_counter()
        found |= {f"{work} | {name}": digest(array) for name, array in results()}
        if arguments.seconds:
            print(f"{time.perf_counter() - began:6.1f} s  {work}", flush=True)
    arguments.out.write_text(json.dumps(found))


def digest(array: np.ndarray) -> dict:
    """What tells whether two arrays have the same bits, and how far they are apart if not."""
    array = np.ascontiguousarray(array)
    values = array.astype(np.float64).ravel()
    return {
        "kind": f"{array.dtype.name} {array.shape}",
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "norm": float(np.linalg.norm(values)),
        "projections": [float(part) for part in _signs(values.size) @ values],
    }


@functools.lru_cache(maxsize=256)
def _signs(size: int) -> np.ndarray:
    """(PROJECTIONS, size) of -1 and 1."""
    return np.random.default_rng(size).integers(0, 2, (PROJECTIONS, size), np.int8) * 2.0 - 1.0


def works(name: str) -> dict:
    """Name -> a function without arguments that yields (name, array) pairs.

    A work's name is "backend, dtype, kernel, what". A brief one leaves out variants; see `brief`.
    """
    backend, found = registry.get(name), {}

    def add(work, dtype, kernel, what, *arguments):
        found[f"{name}, {dtype}, {kernel}, {what}"] = functools.partial(work, backend, dtype, *arguments)

    for dtype in DTYPES:
        for kernel in scan_kernels(backend):
            if not brief(backend) or (dtype, kernel) in BRIEF_SCANS:
                add(scan, dtype, kernel, "scan", kernel)
            if not brief(backend) or kernel == "chunked":
                add(with_kernel, dtype, kernel, "model", kernel)
        for kernel in ("auto", plain(backend)):
            add(conv, dtype, "auto" if kernel == "auto" else "sequential", "conv", kernel)
        add(op_steps, dtype, "auto", "steps of ops")
        for config in CONFIGS:
            for work in (positions, carried, loss_gradients, generation, training):
                what = work.__name__.replace("_", " ")
                if not brief(backend) or config == "small" or (what, config) in BRIEF_WORKS:
                    add(work, dtype, "auto", f"{what}, {config}", config)
        for work in (nodes, features, layers, pieces):
            if not brief(backend) or dtype == "float32" or work is pieces:
                add(work, dtype, "auto", work.__name__)
        if name == "torch":
            add(quantized, dtype, "auto", "quantized")
    return found


def brief(backend) -> bool:
    return backend.name == "jax"


def scan_kernels(backend) -> list[str]:
    """Those that run on the CPU."""
    reasons = backend.available_kernels("cpu")["selective_scan"] if _is_by_op(backend) else backend.kernels("cpu")
    return [name for name, reason in reasons.items() if reason is None]


def plain(backend) -> str:
    """The name that asks for the framework's own operations."""
    return "plain" if _is_by_op(backend) else "sequential"


def _is_by_op(backend) -> bool:
    """Whether the backend of this commit names its kernels by op."""
    return hasattr(backend, "available_kernels")


def op(backend, name: str):
    """An op of the backend: an attribute, or a function of what its method `op` gives."""
    if hasattr(backend, name):
        return getattr(backend, name)
    files = (backend.op(file) for file in ("selective_scan", "causal_conv"))
    return next(getattr(file, name) for file in files if hasattr(file, name))


# --- ops -------------------------------------------------------------------------------------------


def scan(backend, dtype: str, kernel: str) -> Named:
    """With all that it takes and with as little as possible, and the gradients of all arguments."""
    b, l, e, n = 2, 150, 70, 5
    x, delta, z, dy = normal("scan", 4, b, l, e)
    B, C = normal("scan.BC", 2, b, l, n)
    (D, bias), A = normal("scan.D", 2, e), -np.exp(normal("scan.A", e, n))
    (h0, dh), (mask, segments) = normal("scan.h", 2, b, e, n), positions_of(b, l)
    given = arrays(backend, dtype, x, delta, A, B, C, D, z, bias, h0, whole=(2, 5, 7, 8))
    (last,), (first,) = arrays(backend, "float32", dh), arrays(backend, dtype, dy)
    mask, segments = (backend.from_numpy(value, device="cpu") for value in (mask, segments))

    def full(x, delta, A, B, C, D, z, bias, h0, **where):
        options = {"delta_softplus": True, "return_final_state": True, "kernel": kernel}
        return tuple(
            mc.selective_scan(x, delta, A, B, C, D, z=z, delta_bias=bias, initial_state=h0, **options, **where)
        )

    def least(x, delta, A, B, C):
        return (mc.selective_scan(x, delta * delta, A, B, C, kernel=kernel),)

    if not brief(backend) or kernel == "native":
        yield from vjp(backend, "least", least, given[:5], [first])
        yield from vjp(backend, "full", full, given, [first, last])
    packed = functools.partial(full, mask=mask, segment_ids=segments)
    yield from vjp(backend, "mask and segments", packed, given, [first, last])


def conv(backend, dtype: str, kernel: str) -> Named:
    b, l, e, k = 2, 70, 37, 4
    x, dy = normal("conv", 2, b, l, e)
    weight, bias, (h0, dh) = normal("conv.w", e, k), normal("conv.b", e), normal("conv.h", 2, b, k - 1, e)
    given = arrays(backend, dtype, x, weight, bias, h0)
    cotangents = arrays(backend, dtype, dy, dh)
    mask, segments = (backend.from_numpy(value, device="cpu") for value in positions_of(b, l))

    def full(x, weight, bias, h0, **where):
        options = {"activation": "silu", "return_final_state": True, "kernel": kernel}
        return tuple(op(backend, "causal_conv")(x, weight, bias, initial_state=h0, **options, **where))

    def least(x, weight):
        return (op(backend, "causal_conv")(x, weight, kernel=kernel),)

    yield from vjp(backend, "least", least, given[:2], cotangents[:1])
    yield from vjp(backend, "full", full, given, cotangents)
    packed = functools.partial(full, mask=mask, segment_ids=segments)
    yield from vjp(backend, "mask and segments", packed, given, cotangents)


def op_steps(backend, dtype: str) -> Named:
    b, e, n, k = 2, 37, 5, 4
    x, delta, z = normal("step", 3, b, e)
    B, C = normal("step.BC", 2, b, n)
    (D, bias), A, h = normal("step.D", 2, e), -np.exp(normal("step.A", e, n)), normal("step.h", b, e, n)
    x, delta, A, B, C, D, z, bias, h = arrays(backend, dtype, x, delta, A, B, C, D, z, bias, h, whole=(2, 5, 7, 8))
    found = mc.selective_step(x, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, state=h)
    yield from flat(backend, "selective_step", found)
    values = normal("step.w", e, k), normal("step.b", e), normal("step.conv", b, k - 1, e)
    weight, bias, state = arrays(backend, dtype, *values)
    found = op(backend, "causal_conv_step")(x, weight, bias, activation="silu", state=state)
    yield from flat(backend, "causal_conv_step", found)


# --- models ----------------------------------------------------------------------------------------


def positions(backend, dtype: str, config_name: str) -> Named:
    """The forward pass without and with a mask, padded on either side, and with segments."""
    config = CONFIGS[config_name]
    call, ids = calls.forward(build(backend, config, dtype)), tokens(config, LENGTH)
    for name, (mask, segments) in positions_by_name().items():
        if brief(backend) and config_name != "small" and name != "both":
            continue
        yield from flat(backend, name, call(*given(backend, ids), None, *given(backend, mask, segments)))


def carried(backend, dtype: str, config_name: str) -> Named:
    """A sequence in several calls, then single steps."""
    config = CONFIGS[config_name]
    call = calls.forward(build(backend, config, dtype))
    ids, state, begin = tokens(config, ENDS[-1] + 4), None, 0
    for end in (*ENDS, *range(ENDS[-1] + 1, ids.shape[1] + 1)):
        logits, state = call(*given(backend, ids[:, begin:end]), state)
        yield from flat(backend, f"to {end}", (logits, state))
        begin = end


def loss_gradients(backend, dtype: str, config_name: str) -> Named:
    """The loss and the gradients of all parameters, without and with a mask, the blocks kept or computed again."""
    config = CONFIGS[config_name]
    model, ids = build(backend, config, dtype), tokens(config, LENGTH)
    variants = [(False, "plain"), (False, "right padding"), (True, "plain"), (True, "right padding")]
    if brief(backend):
        variants = variants[::3] if config_name == "small" else variants[1:2]
    for remat, name in variants:
        model.remat = remat
        loss, found = backend.loss_and_gradients(model, ids, positions_by_name()[name][0])
        yield f"{name}, remat {remat}, loss", np.array(loss)
        for parameter, gradient in found.items():
            yield f"{name}, remat {remat}, {parameter}", gradient


def generation(backend, dtype: str, config_name: str) -> Named:
    """Ragged prompts, greedy and sampled, read in chunks, and a turn that goes on."""
    model = build(backend, CONFIGS[config_name], dtype)
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12]]
    greedy = mc.generate(model, prompts, max_new_tokens=6, top_logprobs=3, return_state=True)
    yield from generated(backend, "greedy", greedy)
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    settings |= {"presence_penalty": 0.2, "frequency_penalty": 0.1, "logit_bias": {3: -2.0, 4: 1.0}}
    settings |= {"max_new_tokens": 6, "seed": [1, 2, 3], "n": 2, "prefill_chunk": 4, "return_state": True}
    sampled = mc.generate(model, prompts, **settings)
    yield from generated(backend, "sampled", sampled)
    again = mc.generate(model, prompts, max_new_tokens=3, state=greedy.state, return_state=True)
    yield from generated(backend, "going on", again)


def training(backend, dtype: str, config_name: str) -> Named:
    """Three steps, and what the trained model computes, whose biases are no longer zero."""
    config = CONFIGS[config_name]
    model = build(backend, config, dtype)
    settings = mc.TrainSettings(steps=3, batch_size=BATCH, length=LENGTH - 1, warmup_steps=1, learning_rate=0.01)
    trainer = backend.trainer(model, settings)
    for step in range(settings.steps):
        yield f"loss and norm {step}", np.array(trainer.step(tokens(config, LENGTH, f"step {step}")))
    for name, value in backend.parameters(model).items():
        yield f"parameter {name}", np.asarray(value)
    for name, value in trainer.state().items():
        yield f"state {name}", value
    yield from flat(backend, "forward", calls.forward(model)(*given(backend, tokens(config, LENGTH - 1))))


def with_kernel(backend, dtype: str, kernel: str) -> Named:
    """A model with a scan kernel by name: padded and packed, and the gradients of a padded batch."""
    config = mc.MambaConfig(**TASK_SIZES)
    model = build(backend, config, dtype, kernel)
    call, ids = calls.forward(model), tokens(config, LENGTH)
    for name in ("both",) if brief(backend) else ("plain", "both"):
        yield from flat(backend, name, call(*given(backend, ids), None, *given(backend, *positions_by_name()[name])))
    loss, found = backend.loss_and_gradients(model, ids, positions_by_name()["left padding"][0])
    yield "loss", np.array(loss)
    yield from found.items()


def nodes(backend, dtype: str) -> Named:
    """Every node of the block graph."""
    seen = {}
    model = build(backend, SMALL, dtype)
    model(*given(backend, tokens(SMALL, LENGTH)), observe=lambda name, array: seen.update({name: array}))
    for name, array in seen.items():
        yield name, backend.to_numpy(array)


def features(backend, dtype: str) -> Named:
    """Without a head: the hidden states, and the gradients of all parameters, with a mask and segments."""
    config = mc.MambaConfig(**TASK_SIZES, task="features")
    model = build(backend, config, dtype)
    (ids,), (dy,) = given(backend, tokens(config, LENGTH)), arrays(backend, dtype, normal("dy", BATCH, LENGTH, 32))
    call, gradients = calls.forward(model), calls.gradients(model)
    for name in ("both",) if brief(backend) else ("plain", "both"):
        where = given(backend, *positions_by_name()[name])
        yield from flat(backend, name, call(ids, None, *where))
        yield from ranked(backend, f"{name}, gradient", gradients(ids, dy, *where))


def layers(backend, dtype: str) -> Named:
    """From embeddings, and their gradient, through the states too."""
    model = build(backend, mc.MambaConfig(**TASK_SIZES, task="layers"), dtype)
    x, dy = arrays(backend, dtype, *normal("layers", 2, BATCH, LENGTH, 32))
    for name in ("both",) if brief(backend) else ("plain", "both"):
        mask, segments = given(backend, *positions_by_name()[name])

        def function(x, mask=mask, segments=segments):
            out = model(x, mask=mask, segment_ids=segments)
            return out.hidden, *_leaves(out.state)[:-1]

        states = _leaves(model.init_state(BATCH))[:-1]
        ones = [backend.from_numpy(normal(f"state {i}", *state.shape)) for i, state in enumerate(states)]
        ones = [_as(backend, one, state) for one, state in zip(ones, states, strict=True)]
        yield from vjp(backend, name, function, [x], [dy, *ones])


def pieces(backend, dtype: str) -> Named:
    """A long input, which a block computes in pieces, and its gradients where blocks are computed again."""
    model = build(backend, WIDE, dtype)
    ids = tokens(WIDE, WIDE_LENGTH, batch=WIDE_BATCH)
    yield from flat(backend, "forward", calls.forward(model)(*given(backend, ids)))
    if brief(backend) and dtype != "float32":
        return
    model.remat = True
    (dy,) = arrays(backend, dtype, normal("wide", WIDE_BATCH, WIDE_LENGTH, WIDE.d_model))
    yield from ranked(backend, "gradient", calls.gradients(model)(*given(backend, ids), dy))


def quantized(backend, dtype: str) -> Named:
    """The weights of a torch model in 8 bits."""
    quantize = importlib.import_module("mamba_core.backends.torch").quantize
    config = mc.MambaConfig(d_model=128, n_layer=2, vocab_size=64)
    model = build(backend, config, dtype)
    model = quantize(model) or model
    yield from flat(backend, "forward", calls.forward(model)(*given(backend, tokens(config, LENGTH))))
    yield from generated(backend, "greedy", mc.generate(model, [[1, 2, 3]], max_new_tokens=4, return_state=True))


# --- inputs and results ----------------------------------------------------------------------------


def build(backend, config, dtype: str, kernels: str = "auto"):
    return mc.build(config, backend=backend.name, dtype=dtype, device="cpu", kernels=kernels, seed=1)


def stream(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def normal(name: str, *shape: int) -> np.ndarray:
    return stream(name).normal(size=shape).astype(np.float32)


def tokens(config, length: int, name: str = "tokens", batch: int = BATCH) -> np.ndarray:
    return stream(name).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


def positions_of(b: int, l: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask with holes and segments of many lengths, (b, l)."""
    rng = stream("positions")
    return rng.random((b, l)) < 0.8, np.cumsum(rng.random((b, l)) < 0.1, axis=1).astype(np.int32)


@functools.cache
def positions_by_name() -> dict[str, tuple[np.ndarray | None, np.ndarray | None]]:
    """(mask, segment_ids) of BATCH rows."""
    at, lengths = np.arange(LENGTH), np.array([[LENGTH], [LENGTH - 9], [5]])
    segments = np.cumsum(stream("segments").random((BATCH, LENGTH)) < 0.15, axis=1).astype(np.int32)
    return {
        "plain": (None, None),
        "left padding": (at >= LENGTH - lengths, None),
        "right padding": (at < lengths, None),
        "segments": (None, segments),
        "both": (at < lengths, segments),
    }


def arrays(backend, dtype: str, *values: np.ndarray, whole=()) -> list:
    """Arrays of the backend in the dtype; those whose place is in `whole` in float32."""
    return [
        backend.from_numpy(value, dtype="float32" if place in whole else dtype, device="cpu")
        for place, value in enumerate(values)
    ]


def given(backend, *values: np.ndarray | None) -> list:
    return [None if value is None else backend.from_numpy(value, device="cpu") for value in values]


def vjp(backend, name: str, function, arguments, cotangents) -> Named:
    outputs, gradients = backend.vjp(function, arguments, cotangents)
    for index, value in enumerate(outputs):
        yield f"{name}, output {index}", value
    for index, value in enumerate(gradients):
        yield f"{name}, gradient {index}", value


def flat(backend, name: str, values) -> Named:
    """The arrays of a tree by their places in it, because a state's fields may be called otherwise."""
    for index, value in enumerate(_leaves(values)):
        yield f"{name} {index}", backend.to_numpy(value)


def ranked(backend, name: str, values) -> Named:
    """Arrays by shape and norm, because parameters may be called and ordered otherwise."""
    found = [backend.to_numpy(value) for value in values]
    found.sort(key=lambda value: (value.shape, float(np.linalg.norm(value.astype(np.float64)))))
    for index, value in enumerate(found):
        yield f"{name} {index}, {value.shape}", value


def generated(backend, name: str, result) -> Named:
    for row, tokens in enumerate(result.tokens):
        yield f"{name}, tokens {row}", np.array(tokens, np.int64)
        yield f"{name}, logprobs {row}", np.array(result.logprobs[row], np.float64)
        if result.top_logprobs is not None:
            yield f"{name}, top logprobs {row}", np.array(result.top_logprobs[row], np.float64)
    yield from flat(backend, f"{name}, state", result.state)


def _leaves(tree) -> list:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in _leaves(part)]
    return [] if tree is None else [tree]


def _as(backend, array, like):
    """In the dtype of another array."""
    return backend.from_numpy(backend.to_numpy(array), dtype=backend.to_numpy(like).dtype.name, device="cpu")


if __name__ == "__main__":
    main()
