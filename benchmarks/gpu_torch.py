"""The PyTorch backend on one GPU, beside mamba_ssm where it is installed: training, a mixer, decoding, single kernels.

    python -m mamba_core.benchmarks.gpu_torch --out gpu.json                    all parts, some minutes
    python -m mamba_core.benchmarks.gpu_torch --part decode --preset mamba-2.8b --batch 1

A part that fails is reported and the rest goes on. Times are in milliseconds, medians: of training and decoding on the
host's clock, as a user sees them, else between device events with nothing of use in the cache. Beside them in the table
stands their floor, the bytes that must move at the bandwidth of a copy, which is measured first.
"""

import argparse
import dataclasses
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mamba_core import sampling
from mamba_core.backends.torch import decoding as torch_decoding
from mamba_core.backends.torch import ops, quantize
from mamba_core.backends.torch import training as torch_training
from mamba_core.backends.torch.heads import model_class
from mamba_core.backends.torch.kernels import (
    cuda_graph,
    cuda_scan,
    triton,
    triton_conv,
    triton_gated_norm,
    triton_linear,
    triton_loss,
    triton_norm,
)
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.call import Call
from mamba_core.config import preset
from mamba_core.kernels import Kernels
from mamba_core.spec.params import parameter_table
from mamba_core.training import TrainSettings

DEVICE = "cuda"
BF16 = torch.bfloat16
BATCH, LENGTH = 8, 2048
PROMPT, TOKENS = 16, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all but tune by default")
    parser.add_argument("--preset", action="append", help="of training, a mixer and decoding; some by default")
    parser.add_argument("--batch", action="append", type=int, help="of decoding; 1 and 64 by default")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-overlap", action="store_true", help="no programmatic dependent launch in decoding")
    parser.add_argument("--profile", action="store_true", help="the kernels that took the most time, too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.no_overlap:
        triton.OVERLAP = False
    report = {
        "gpu": torch.cuda.get_device_name(),
        "processor": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "copy_tb_per_s": (bandwidth := copy_bandwidth()),
        "rows": [],
    }
    for part in arguments.part or [part for part in PARTS if part != "tune"]:
        started = time.perf_counter()
        for row in PARTS[part](arguments):
            if "bytes" in row:
                row["floor_ms"] = row["bytes"] / bandwidth / 1e9
            report["rows"].append({"part": part} | row)
            print(line(row), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"[{part}: {time.perf_counter() - started:.0f} s]", flush=True)
    print(f"\n{report['gpu']}, torch {torch.__version__}, copy {bandwidth:.2f} TB/s")
    for row in report["rows"]:
        print(line(row))


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['name']:<44} failed: {row['error']}"
    cells = [f"{row['name']:<44} {row['ms']:9.4f} ms"]
    if "floor_ms" in row:
        cells.append(f"{row['ms'] / row['floor_ms']:6.2f} x floor {row['floor_ms']:.4f}")
    cells += [
        f"{name} {value:.4g}"
        for name, value in row.items()
        if name in ("peak_gb", "reserved_gb", "replay_ms", "error_rel")
    ]
    return "  ".join(cells)


def attempt(name: str, measure: Callable[[], dict]) -> dict:
    try:
        return {"name": name} | measure()
    except Exception as fault:  # the other rows are worth having
        traceback.print_exc()
        return {"name": name, "error": f"{type(fault).__name__}: {fault}"[:300]}
    finally:
        torch.cuda.empty_cache()


def median_ms(call: Callable, rounds: int = 20, warm_ups: int = 5) -> float:
    for _ in range(warm_ups):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    # What lies in the cache from the round before is pushed out.
    other = torch.empty(1 << 26, dtype=torch.int32, device=DEVICE)
    for before, after in events:
        other.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def copy_bandwidth() -> float:
    """TB/s, reads and writes counted."""
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e9


def random_model(config, dtype=torch.float32, kernels="auto"):
    """Values of the right size, drawn on the device: billions would take minutes on the host."""
    with torch.device("meta"):
        model = model_class(config.task)(config, Kernels.read(kernels, ops.available_kernels(DEVICE)))
    model.to_empty(device=DEVICE)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, entry in parameter_table(config).items():
            value = model.get_parameter(name)
            if name.endswith("A_log"):
                value.copy_(torch.arange(1, value.shape[-1] + 1, device=DEVICE).log().expand_as(value))
            elif name.endswith(("dt_proj.bias", "dt_bias")):
                value.uniform_(-6.9, -2.3)
            elif name.endswith((".D", "norm.weight", "norm2.weight", "norm_f.weight")):
                value.fill_(1.0)
            else:
                value.uniform_(-1.0, 1.0).mul_(entry.shape[-1] ** -0.5)
    model.built = type(model)
    return model.to(dtype)


# --- training ------------------------------------------------------------------------------------


def training(arguments):
    for name in arguments.preset or ("mamba-130m", "mamba2-130m"):
        yield from training_of(name, arguments)


def training_of(name: str, arguments):
    tokens = np.random.default_rng(0).integers(0, 50277, (BATCH, LENGTH + 1)).astype(np.int32)

    def ours():
        model = random_model(preset(name))
        trainer = torch_training.Trainer(model, TrainSettings(steps=1000, warmup_steps=10))

        def step():
            with torch.autocast(DEVICE, BF16):
                trainer.step(tokens)

        return timed_training(step, arguments)

    def theirs():
        model = peer_model(preset(name))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        ids = torch.from_numpy(tokens).long().to(DEVICE)

        def step():
            optimizer.zero_grad()
            with torch.autocast(DEVICE, BF16):
                logits = model(ids[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

        return timed_training(step, arguments)

    yield attempt(f"training step {name} b8 l2048", ours)
    if not arguments.no_peers:
        yield attempt(f"training step {name} b8 l2048, mamba_ssm", theirs)


def timed_training(step, arguments) -> dict:
    # With the steps before ours is captured, and that one: a replay asks for no memory.
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        step()
    walls = []
    for _ in range(10):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        walls.append(1e3 * (time.perf_counter() - started))
    found = {"ms": statistics.median(walls), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    if arguments.profile:
        profile(step, 2)
    return found


def profile(call, times: int) -> None:
    """Prints the kernels that took the most device time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    with recorded(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in events)
    print(f"    device time {total / times / 1e3:.3f} ms a call")
    for event in events[:24]:
        each, count = event.device_time_total / event.count, event.count / times
        print(f"    {event.device_time_total / times / 1e3:9.3f} ms {count:6.0f} x {each:9.1f} us  {event.key[:90]}")


# --- a block -------------------------------------------------------------------------------------


def block(arguments):
    for name in arguments.preset or ("mamba-130m", "mamba2-130m"):
        yield from mixer_of(name, arguments)


def mixer_of(name: str, arguments):
    config = dataclasses.replace(preset(name), n_layer=1, task="layers")
    x = torch.randn(BATCH, LENGTH, config.d_model, device=DEVICE, requires_grad=True)
    dy = torch.randn(BATCH, LENGTH, config.d_model, device=DEVICE, dtype=BF16)

    def run(forward, parameters, backward):
        def call():
            with torch.autocast(DEVICE, BF16):
                y = forward(x)
            if backward:
                torch.autograd.grad(y, [x, *parameters], dy)

        with torch.set_grad_enabled(backward):
            return {"ms": median_ms(call)}

    def ours(backward):
        model = random_model(config)
        mixer, state = model.backbone.layers[0].mixer, model.init_state(BATCH).layers[0]
        return run(lambda x: mixer(x, state, Call())[0], list(mixer.parameters()), backward)

    def theirs(backward):
        import mamba_ssm

        kind = mamba_ssm.Mamba if name == "mamba-130m" else mamba_ssm.Mamba2
        mixer = kind(config.d_model, device=DEVICE)
        return run(mixer, list(mixer.parameters()), backward)

    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        yield attempt(f"mixer of {name} b8 l2048, {what}", partial(ours, backward))
        if not arguments.no_peers:
            yield attempt(f"mixer of {name} b8 l2048, {what}, mamba_ssm", partial(theirs, backward))


# --- decoding ------------------------------------------------------------------------------------


def decoding(arguments):
    for name in arguments.preset or ("mamba-130m", "mamba-2.8b"):
        config = preset(name)
        for batch in arguments.batch or (1, 64):
            yield attempt(f"decode {name} b{batch}, per step", partial(decode_ours, config, batch, arguments))
            for bits in (8, 4) if batch == 1 else ():
                measure = partial(decode_ours, config, batch, arguments, bits)
                yield attempt(f"decode {name} b{batch}, per step, {bits} bits", measure)
            if not arguments.no_peers:
                yield attempt(f"decode {name} b{batch}, per step, mamba_ssm", partial(decode_theirs, config, batch))


def decode_ours(config, batch: int, arguments, bits: int = 0) -> dict:
    model = random_model(config, BF16)
    if bits:
        model = quantize(model, bits)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, PROMPT)).astype(np.int32)
    prefilled = torch_decoding.prefill(model, tokens, np.ones(tokens.shape, bool))
    greedy = sampling.Sampling()
    # Two runs at once would need two graphs; the second run finds the first's.
    for _ in range(2):
        steps = torch_decoding.decode(model, prefilled, greedy)
        list(islice(steps, 2 * cuda_graph.AT_ONCE))
        torch.cuda.synchronize()
        started = time.perf_counter()
        list(islice(steps, TOKENS))
        wall = 1e3 * (time.perf_counter() - started) / TOKENS
        steps.close()
    ((_, captured),) = torch_decoding._captured._kept.values()

    @torch.inference_mode()
    def replay():
        captured._index.zero_()
        captured._graph.replay()

    found = {"ms": wall, "replay_ms": successive_ms(replay)}
    if arguments.profile:
        profile(replay, 4)
    state = sum(value.nbytes for layer in prefilled.state.layers for value in layer)
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    # A row of the embedding is read for each token, where the head is not the embedding.
    weights -= model.backbone.embeddings.weight.nbytes if bits else 0
    torch_decoding._captured = cuda_graph.CapturedCache()
    return found | {"bytes": weights + 2 * state}


def successive_ms(call, rounds: int = 64) -> float:
    """Of one of many calls without a pause, as a text is decoded."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    before.record()
    for _ in range(rounds):
        call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / rounds


def decode_theirs(config, batch: int) -> dict:
    model = peer_model(config, BF16).eval()
    ids = torch.randint(0, config.vocab_size, (batch, PROMPT), device=DEVICE)

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(ids, max_length=PROMPT + count, cg=True, top_k=1)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    few, many = 16, 16 + TOKENS
    seconds(many)
    return {"ms": 1e3 * statistics.median((seconds(many) - seconds(few)) / TOKENS for _ in range(3))}


def peer_model(config, dtype=torch.float32):
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    sizes = {"d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": config.vocab_size}
    theirs = MambaConfig(**sizes, ssm_cfg={"layer": "Mamba2"} if hasattr(config, "headdim") else {})
    return MambaLMHeadModel(theirs, device=DEVICE, dtype=dtype)


# --- single kernels ------------------------------------------------------------------------------


def kernels(arguments):
    d, e, n = 768, 1536, 16
    rows = BATCH * LENGTH
    residual, hidden = torch.randn(rows, d, device=DEVICE), torch.randn(rows, d, device=DEVICE, dtype=BF16)
    scale = torch.ones(d, device=DEVICE)
    normed, total, factors = triton_norm._forward(residual, hidden, scale, 1e-5, BF16)
    norm = (residual, hidden, scale, 1e-5, BF16)
    yield attempt(
        "add_norm forward", lambda: {"ms": median_ms(lambda: triton_norm._forward(*norm)), "bytes": rows * d * 12}
    )
    yield attempt(
        "add_norm backward",
        lambda: {
            "ms": median_ms(lambda: triton_norm._backward(normed, total, total, factors, *norm)),
            "bytes": rows * d * 16,
        },
    )
    xz = torch.randn(BATCH, LENGTH, 2 * e, device=DEVICE, dtype=BF16)
    x, z = xz.chunk(2, -1)
    taps, bias = torch.randn(e, 4, device=DEVICE), torch.randn(e, device=DEVICE)
    conv = (x, taps, bias, torch.zeros(BATCH, 3, e, device=DEVICE), None, True)
    size = BATCH * LENGTH * e * 2
    yield attempt("conv forward", lambda: {"ms": median_ms(lambda: triton_conv.conv(*conv)), "bytes": 2 * size})
    dy, dz, dxz = torch.randn_like(x), torch.randn_like(x), torch.empty_like(xz)
    yield attempt(
        "conv backward, and a copy",
        lambda: {
            "ms": median_ms(lambda: triton_conv.conv_backward(dy, None, *conv, dxz[..., :e], dz)),
            "bytes": 5 * size,
        },
    )
    delta, BC = torch.randn_like(dy), torch.randn(BATCH, LENGTH, n, device=DEVICE, dtype=BF16)
    A = -torch.arange(1.0, n + 1, device=DEVICE).expand(e, n).contiguous()
    D, steps = torch.ones(e, device=DEVICE), torch.full((e,), -4.0, device=DEVICE)
    scan = (dy, delta, A, BC, BC, D, z, steps, None, None, None, True, True)
    yield attempt("scan forward", lambda: {"ms": median_ms(lambda: cuda_scan._scan(*scan)), "bytes": 4 * size})

    def scan_backward():
        kept = cuda_scan._scan(*scan)[2]
        return {"ms": median_ms(lambda: cuda_scan._scan_backward(dy, None, kept, *scan)), "bytes": 7 * size}

    yield attempt("scan backward", scan_backward)
    weight, targets = torch.randn(50280, d, device=DEVICE), torch.randint(0, 50277, (rows,), device=DEVICE)
    for limit in (27, 28, 29):

        def loss(limit=limit):
            triton_loss.BYTES = 1 << limit
            return {"ms": median_ms(lambda: triton_loss._forward(normed, weight, targets, True), 5, 2)}

        yield attempt(f"head and loss, logits of {1 << limit - 20} MiB at once", loss)
    triton_loss.BYTES = 1 << 28
    yield from products(arguments)


def gated_norm(arguments):
    """Of a layer of mamba2-130m; z is a slice of in_proj's output."""
    e, projected = 1536, 3352
    y, dy = (torch.randn(BATCH, LENGTH, e, device=DEVICE, dtype=BF16) for _ in range(2))
    z = torch.randn(BATCH, LENGTH, projected, device=DEVICE, dtype=BF16)[..., :e]
    given = (y, z, torch.ones(e, device=DEVICE), 1, 1e-5, False)
    _, factors = triton_gated_norm._forward(*given, BF16)

    def forward(kernel):
        with torch.no_grad():
            return {"ms": median_ms(lambda: kernel(*given)), "bytes": 3 * y.nbytes}

    def backward():
        call = partial(triton_gated_norm._backward, dy, factors, *given, BF16)
        return {"ms": median_ms(call), "bytes": 5 * y.nbytes}

    yield attempt("gated norm forward", partial(forward, partial(triton_gated_norm._forward, dtype=BF16)))
    yield attempt("gated norm forward, plain operations", partial(forward, ops.gated_norm.plain))
    yield attempt("gated norm backward", backward)


def products(arguments):
    """The kernels of a decoded position by themselves: a graph of one a layer, each with weights of its own."""
    for name in arguments.preset or ("mamba-130m", "mamba-2.8b"):
        config = preset(name)
        d, e, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank_size
        for what, outputs, inputs in (
            ("in_proj", 2 * e, d),
            ("x_proj", r + 2 * n, e),
            ("out_proj", d, e),
            ("head", 50280, d),
        ):
            count = max(4, min(config.n_layer, (1 << 28) // (2 * outputs * inputs)))
            weights = [torch.randn(outputs, inputs, device=DEVICE, dtype=BF16) for _ in range(count)]
            x = torch.randn(1, inputs, device=DEVICE, dtype=BF16)
            y = torch.empty(1, outputs, device=DEVICE)

            def ours(weights=weights, x=x, y=y):
                return graph_ms(
                    lambda: [triton_linear.multiply(x, weight, None, y) for weight in weights], len(weights)
                )

            def cublas(weights=weights, x=x):
                return graph_ms(lambda: [F.linear(x, weight) for weight in weights], len(weights))

            size = {"bytes": 2 * outputs * inputs}
            yield attempt(f"{name} {what} b1", lambda ours=ours, size=size: ours() | size)
            yield attempt(f"{name} {what} b1, cuBLAS", lambda cublas=cublas, size=size: cublas() | size)


def graph_ms(call, count: int) -> dict:
    """Of each of the `count` that one call launches, replayed as a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept = call()
    found = {"ms": median_ms(captured.replay) / count}
    del kept
    return found


# --- what is fastest ------------------------------------------------------------------------------


def tune(arguments):
    """The convolution and the products of a decoded position in other shapes than they have."""
    e = 1536
    xz = torch.randn(BATCH, LENGTH, 2 * e, device=DEVICE, dtype=BF16)
    x, dy, dz, dxz = xz[..., :e], *(torch.randn(BATCH, LENGTH, e, device=DEVICE, dtype=BF16) for _ in "yz"), xz.clone()
    taps, bias = torch.randn(e, 4, device=DEVICE), torch.randn(e, device=DEVICE)
    conv = (x, taps, bias, torch.zeros(BATCH, 3, e, device=DEVICE), None, True)
    for walk in ((128, 16, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (256, 32, 2), (256, 32, 4)):
        triton_conv.FORWARD = triton_conv.Walk(*walk)
        yield attempt(f"conv forward {walk}", lambda: {"ms": median_ms(lambda: triton_conv.conv(*conv))})
    for walk in ((128, 32, 2), (128, 64, 2), (128, 64, 4), (128, 128, 4), (256, 64, 2), (256, 64, 4)):
        triton_conv.BACKWARD = triton_conv.Walk(*walk)
        call = partial(triton_conv.conv_backward, dy, None, *conv, dxz[..., :e], dz)
        yield attempt(f"conv backward {walk}", lambda call=call: {"ms": median_ms(call)})
    for outputs, inputs in ((10240, 2560), (2560, 5120), (3072, 768), (768, 1536), (50280, 768)):
        weights = [torch.randn(outputs, inputs, device=DEVICE, dtype=BF16) for _ in range(8 if outputs > 4000 else 24)]
        residual, norm = torch.randn(1, inputs, device=DEVICE), torch.ones(inputs, device=DEVICE, dtype=BF16)
        y = torch.empty(1, outputs, device=DEVICE)
        for each, lines in ((4, 4), (4, 8), (2, 4), (2, 8), (1, 6), (1, 10)):
            triton_linear._outputs_of_program = lambda n, rows, each=each: each
            triton_linear.LINES = lines

            def measured(weights=weights, residual=residual, norm=norm, y=y):
                def call():
                    for weight in weights:
                        triton_linear.multiply(residual, weight, None, y, norm=norm, eps=1e-5)

                return graph_ms(call, len(weights)) | {"bytes": weights[0].nbytes}

            name = f"norm and product {outputs}x{inputs}: {each} outputs, {lines} lines"
            yield attempt(name, measured)


# --- is it right ---------------------------------------------------------------------------------


def check(arguments):
    """Loss, gradients and tokens of the fused path beside those of plain operations, in float32 and bfloat16."""
    config = dataclasses.replace(preset("mamba-130m"), n_layer=3, vocab_size=1001)
    tokens = np.random.default_rng(0).integers(0, 1001, (3, 301)).astype(np.int32)

    def gradients(dtype):
        found = {}
        for kernel in ("auto", "chunked"):
            model = random_model(config, kernels=kernel)
            started = time.perf_counter()
            with torch.autocast(DEVICE, BF16, enabled=dtype == BF16):
                value, found[kernel] = torch_training.loss_and_gradients(model, tokens)
            found[kernel]["loss"] = np.float64(value)
        apart = {
            name: np.linalg.norm(value - found["chunked"][name]) / np.linalg.norm(found["chunked"][name])
            for name, value in found["auto"].items()
        }
        worst = max(apart, key=apart.get)
        print(f"    worst: {worst}")
        return {"ms": 1e3 * (time.perf_counter() - started), "error_rel": float(apart[worst])}

    def decoded(dtype, batch):
        model = random_model(config, dtype)
        prefilled = torch_decoding.prefill(model, tokens[:1, :40].repeat(batch, 0), np.ones((batch, 40), bool))
        greedy, started = sampling.Sampling(), time.perf_counter()
        found = list(islice(torch_decoding.decode(model, prefilled, greedy), 40))
        carry, apart = torch_decoding.begin(prefilled, None, None, greedy), []
        with torch.no_grad():
            for choice in found:
                # Along the same tokens, also where two are as likely.
                same = carry.choice._replace(tokens=torch.from_numpy(choice.tokens).to(DEVICE))
                apart.append(np.abs(choice.logprobs - carry.choice.logprobs.float().cpu().numpy()).max())
                carry = torch_decoding.advance(model, carry._replace(choice=same), None, greedy)
        return {"ms": 1e3 * (time.perf_counter() - started), "error_rel": float(max(apart))}

    for dtype in (torch.float32, BF16):
        name = str(dtype).removeprefix("torch.")
        yield attempt(f"gradients, fused and chunked, {name}", partial(gradients, dtype))
        for batch in (1, 3, 70):
            yield attempt(f"log-probabilities decoded, {name} b{batch}", partial(decoded, dtype, batch))


PARTS = {
    "check": check,
    "training": training,
    "block": block,
    "decode": decoding,
    "kernels": kernels,
    "gated_norm": gated_norm,
    "tune": tune,
}


if __name__ == "__main__":
    main()
