"""Self-tests of kernels: what "auto" does with a broken kernel, what is kept, and that no trace sees a trial.

Kernels of the CPU stand in for those of accelerators: `TRUSTED` is emptied, so that "auto" tries them.
"""

import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
import timeit
import warnings

import numpy as np
import pytest

from mamba_core import kernels, registry, selftest
from mamba_core.backends.native import library
from mamba_core.spec import ops
from mamba_core.spec.ops.base import samples_of
from mamba_core.spec.tolerances import relative_l2

pytestmark = pytest.mark.skipif(library.missing() is not None, reason="the native kernel is what is broken here")


@pytest.fixture(autouse=True)
def an_accelerator(monkeypatch, tmp_path):
    """The CPU as a device on which no kernel has been tried, and an empty cache."""
    monkeypatch.setattr(selftest, "TRUSTED", ())
    monkeypatch.setenv("MAMBA_CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAMBA_CORE_SELFTEST", raising=False)
    _forget_all()
    yield
    _forget_all()


def _forget_all():
    selftest.forget()
    for name, forget in (("jax", "clear_caches"), ("torch._dynamo", "reset")):
        if name in sys.modules:
            getattr(sys.modules[name], forget)()


def scan(backend, kernel="auto", **more):
    """y of a small scan with all options, as NumPy."""
    rng, (b, l, e, n) = np.random.default_rng(0), (1, 5, 3, 2)
    shapes = {"x": (b, l, e), "delta": (b, l, e), "A": (e, n), "B": (b, l, n), "C": (b, l, n), "z": (b, l, e)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["A"] = -np.exp(arrays["A"])
    given = {name: backend.from_numpy(value, device="cpu") for name, value in arrays.items()} | more
    return backend.to_numpy(backend.op("selective_scan").selective_scan(**given, delta_softplus=True, kernel=kernel))


# Where the arguments of a kernel of the scan stand; MLX's have the call before them.
X, Z = 0, 6


class Broken:
    """The native scan, but for one thing; `calls` counts how often it is called."""

    def __init__(self, backend, change):
        self.kernels = backend.op("selective_scan").KERNELS
        self.right, self.change, self.backend, self.calls = self.kernels["native"], change, backend.name, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        positional = arguments[1:] if self.backend == "mlx" else arguments
        y, h = self.right(*arguments, **options)
        return self.change(positional, y), h


def _raise(arguments, y):
    raise RuntimeError("the compiler does not know /home/somebody/kernels.metal")


def _stopped(value):
    module = type(value).__module__.partition(".")[0]
    if module == "torch":
        return value.detach()
    stop = sys.modules["mlx.core"].stop_gradient if module == "mlx" else sys.modules["jax"].lax.stop_gradient
    return stop(value)


FAULTS = {
    "wrong numbers": lambda arguments, y: y * 1.01,
    "an exception": _raise,
    "only in the gradient": lambda arguments, y: y + 0.01 * (arguments[X] - _stopped(arguments[X])),
    "only for an odd length": lambda arguments, y: y * 1.01 if arguments[X].shape[1] == 7 else y,
    "only with a gate": lambda arguments, y: y if arguments[Z] is None else y * 1.01,
    "only in bfloat16": lambda arguments, y: y * 1.2 if "bfloat16" in str(y.dtype) else y,
}


def broken(backend, monkeypatch, fault):
    kernel = Broken(backend, FAULTS[fault])
    monkeypatch.setitem(kernel.kernels, "native", kernel)
    return kernel


@pytest.fixture
def runs(monkeypatch):
    """The (op, kernel) that were tried."""
    tried, examine = [], selftest.examine

    def counted(backend, op, kernel, device, **how):
        tried.append((op, kernel))
        return examine(backend, op, kernel, device, **how)

    monkeypatch.setattr(selftest, "examine", counted)
    return tried


@pytest.fixture
def one_trial(monkeypatch):
    """One short trial of the scan, where a test is not about what is tried."""
    scan_op = ops.public()["selective_scan"]
    shortest = [sample for sample in samples_of(scan_op) if sample.drawn.arrays["x"].shape[1] == 7][:1]
    monkeypatch.setattr(selftest, "samples_of", lambda op: shortest if op is scan_op else samples_of(op))


@pytest.fixture
def few_trials(backend, monkeypatch):
    """On JAX the short ones alone, since each shape is compiled."""
    if backend.name == "jax":
        samples = samples_of(ops.public()["selective_scan"])
        short = [one for one in samples if one.dtype == "float32" and one.drawn.arrays["x"].shape[1] < 257]
        monkeypatch.setattr(selftest, "samples_of", lambda op: [*short, short[0]._replace(dtype="bfloat16")])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_passed_over_with_one_warning(backend, monkeypatch, few_trials, fault):
    if fault == "only in bfloat16" and not _computes_bfloat16(backend):
        pytest.skip("the native kernel has no bfloat16")
    kernel = broken(backend, monkeypatch, fault)
    with pytest.warns(UserWarning, match=r"kernel 'native' of selective_scan fails .*mamba-core doctor") as caught:
        y = scan(backend)
    assert len([warning for warning in caught if "self-test" in str(warning.message)]) == 1
    assert "/home/somebody" not in str(caught[0].message)
    tried = kernel.calls
    assert tried > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_l2(scan(backend), scan(backend, "plain")) < 1e-6
    assert relative_l2(y, scan(backend, "plain")) < 1e-6
    assert kernel.calls == tried, 'the broken kernel computed for "auto"'


def _computes_bfloat16(backend):
    return backend.op("selective_scan").kernels(*_arguments(backend))["native"] is None


def _arguments(backend):
    if backend.name == "torch":
        torch = sys.modules["torch"]
        return torch.device("cpu"), torch.bfloat16
    return "cpu", sys.modules["mlx.core"].bfloat16 if backend.name == "mlx" else "bfloat16"


def test_the_verdict_is_read_the_second_time(backend, runs, one_trial, monkeypatch):
    scan(backend)
    assert runs == [("selective_scan", "native")]
    scan(backend)
    _forget_all()
    scan(backend)
    assert len(runs) == 1


def test_a_failure_is_kept_too(backend, runs, one_trial, monkeypatch):
    broken(backend, monkeypatch, "wrong numbers")
    for _ in range(2):
        with pytest.warns(UserWarning, match="fails its self-test"):
            scan(backend)
        assert runs.count(("selective_scan", "native")) == 1
        _forget_all()


CHANGES = {
    "mamba_core": lambda monkeypatch, backend: monkeypatch.setattr(selftest, "VERSION", "9.9"),
    "sources": lambda monkeypatch, backend: monkeypatch.setattr(selftest, "_digest", lambda *paths: "other"),
    "driver": lambda monkeypatch, backend: monkeypatch.setattr(
        selftest, "facts_of", lambda backend, device: {"driver": "9.9"} if device == "cpu" else None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_tries_it_again(backend, runs, one_trial, monkeypatch, change):
    scan(backend)
    CHANGES[change](monkeypatch, backend)
    _forget_all()
    scan(backend)
    assert runs == [("selective_scan", "native")] * 2


def test_a_changed_source_has_another_digest(tmp_path):
    source = tmp_path / "kernel.cu"
    found = set()
    for text in ("one", "two"):
        source.write_text(text)
        selftest._digest.cache_clear()
        found.add(selftest._digest((tmp_path,)))
    assert len(found) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"faults": 3, "trials": 1}', b'{"faults": [1], "trials": 1}'])
def test_a_damaged_verdict_is_found_again(runs, one_trial, tmp_path, content):
    backend = _any()
    scan(backend)
    (kept,) = (tmp_path / "cache" / "selftests").glob("*.json")
    kept.write_bytes(content)
    _forget_all()
    scan(backend)
    assert len(runs) == 2
    assert json.loads(kept.read_bytes())["faults"] == []


def test_a_cache_that_cannot_be_written_is_done_without(runs, one_trial, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    backend = _any()
    for _ in range(2):
        scan(backend)
        _forget_all()
    assert len(runs) == 2


def test_without_a_home_nothing_is_kept(runs, one_trial, monkeypatch):
    monkeypatch.setattr(selftest.cache, "folder", _raise_no_home)
    scan(_any())
    assert len(runs) == 1


def _raise_no_home():
    raise RuntimeError("Could not determine home directory")


@pytest.mark.parametrize("kernel", ["native", "plain", "chunked"])
def test_a_kernel_that_is_named_is_not_tried(backend, runs, kernel, monkeypatch):
    broken(backend, monkeypatch, "wrong numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = scan(backend, kernel)
    assert runs == []
    assert (relative_l2(y, scan(backend, "plain")) > 1e-3) == (kernel == "native")


def test_a_kernel_on_a_cpu_is_not_tried(backend, runs, monkeypatch):
    monkeypatch.setattr(selftest, "TRUSTED", ("cpu",))
    scan(backend)
    backend.build(*_small(), device="cpu")
    assert runs == []
    # JAX asks for the platforms that it may be lowered for.
    assert not [device for *_, device in selftest._known if str(device) == "cpu"]


def _small():
    from mamba_core.config import MambaConfig
    from mamba_core.spec.init import initial_values

    config = MambaConfig(d_model=8, n_layer=1, vocab_size=16)
    return config, initial_values(config, 0)


def test_a_model_says_what_it_uses(backend, one_trial, monkeypatch):
    broken(backend, monkeypatch, "wrong numbers")
    model = backend.build(*_small(), device="cpu")
    with pytest.warns(UserWarning, match="selective_scan fails its self-test"):
        assert model.kernels["selective_scan"] == "chunked"


@pytest.mark.parametrize(("value", "expected"), [("0", 0), ("1", 2)])
def test_the_switch(backend, runs, one_trial, monkeypatch, value, expected):
    monkeypatch.setenv("MAMBA_CORE_SELFTEST", value)
    for _ in range(2):
        scan(backend)
        _forget_all()
    assert len(runs) == expected


# --- what ends or hangs ------------------------------------------------------------------------------------

DYING = """
    import os, sys, warnings
    from tests.unit import test_selftest as t
    t.selftest.TRUSTED = ()
    backend = t.registry.get(sys.argv[1])
    backend.op("selective_scan").KERNELS["native"] = lambda *_, **__: os.kill(os.getpid(), 9)
    print(t.scan(backend).shape)
"""


def test_a_kernel_that_ends_processes_is_passed_over_by_the_next(tmp_path):
    """Twice: the trial is marked while it is under way, and one that ends may have been killed."""
    pytest.importorskip("mlx.core")
    command = [sys.executable, "-c", textwrap.dedent(DYING), "mlx"]
    run = functools.partial(subprocess.run, command, capture_output=True, text=True, env=os.environ.copy())
    *before, last = run(), run(), run()
    assert [done.returncode for done in before] == [-9, -9]
    assert last.returncode == 0, last.stderr
    assert "(1, 5, 3)" in last.stdout
    assert selftest.DIED in last.stderr


def test_two_processes_may_try_at_once(one_trial, runs, tmp_path):
    """The mark of a process that is still there says nothing."""
    backend = _any()
    path = selftest._path(backend, "selective_scan", "native", "cpu")
    mark = selftest._Mark(path)
    assert not mark.was_left
    assert not selftest.settled(backend, "selective_scan", "native", "cpu").faults
    mark.release()
    path.unlink()
    selftest._Mark(path).release()
    assert selftest.settled(backend, "selective_scan", "native", "cpu").faults == (selftest.DIED,)
    # By the doctor it is tried all the same, and what it finds holds.
    assert not selftest.settled(backend, "selective_scan", "native", "cpu", again=True).faults
    assert not selftest.settled(backend, "selective_scan", "native", "cpu").faults


def test_a_trial_that_does_not_end_has_failed(monkeypatch):
    backend, ended, over = _any(), threading.Event(), threading.Event()
    monkeypatch.setattr(selftest, "LONGEST", 0.1)
    monkeypatch.setattr(selftest, "examine", lambda *_, **__: (ended.wait(60), over.set()))
    with pytest.warns(UserWarning, match="did not end"):
        assert not selftest.passes(backend.name, "selective_scan", "native", "cpu")
    # Who had waited for it would have seen it end, whatever the clock says.
    assert not over.is_set()
    ended.set()


def test_a_fault_of_the_moment_is_not_kept(monkeypatch, one_trial, runs):
    backend = _any()
    kernel = Broken(backend, FAULTS["wrong numbers"])
    kernel.change = _run_out_of_memory
    monkeypatch.setitem(kernel.kernels, "native", kernel)
    for _ in range(2):
        with pytest.warns(UserWarning, match="out of memory"):
            scan(backend)
        _forget_all()
    assert runs.count(("selective_scan", "native")) == 2


def _run_out_of_memory(arguments, y):
    raise RuntimeError("CUDA out of memory")


def test_where_the_plain_kernel_raises_too_nothing_is_said(monkeypatch, one_trial):
    """Such as for a dtype that the device does not have."""
    backend = _any()
    kernel = broken(backend, monkeypatch, "an exception")
    monkeypatch.setitem(kernel.kernels, list(kernel.kernels)[-1], kernel)
    verdict = selftest.examine(backend, "selective_scan", "native", "cpu")
    assert verdict.faults == ()
    assert verdict.trials == 0
    assert "the plain kernel raises too" in verdict.skipped[0]


def test_while_a_graph_is_captured_nothing_is_tried(monkeypatch, runs):
    backend = _any()
    monkeypatch.setattr(backend, "is_capturing", lambda: True, raising=False)
    scan(backend)
    assert runs == []
    assert selftest._known == {}


# --- what is tried -----------------------------------------------------------------------------------------


def test_the_samples_of_the_scan_have_every_option_and_odd_sizes():
    samples = samples_of(ops.public()["selective_scan"])
    for name in ("D", "z", "delta_bias", "initial_state"):
        given = {name in sample.drawn.arrays for sample in samples if sample.dtype == "float32"}
        assert given == {False, True}, name
    for name in ("mask", "segment_ids"):
        assert {name in sample.positions for sample in samples if sample.dtype == "float32"} == {False, True}, name
    assert {sample.drawn.options["delta_softplus"] for sample in samples} == {False, True}
    shapes = [sample.drawn.arrays["A"].shape for sample in samples]
    assert {states for _, states in shapes} == {1, 8, 16}
    assert all(channels % 16 for channels, _ in shapes)
    _check_samples(samples)


def test_the_samples_of_the_convolution_have_every_option_and_odd_sizes():
    samples = samples_of(ops.public()["causal_conv"])
    for name in ("bias", "initial_state"):
        assert {name in sample.drawn.arrays for sample in samples} == {False, True}, name
    for name in ("mask", "segment_ids"):
        assert {name in sample.positions for sample in samples} == {False, True}, name
    assert {sample.drawn.options["activation"] for sample in samples} == {None, "silu"}
    assert {sample.drawn.arrays["weight"].shape[1] for sample in samples} == {2, 3, 4}
    # A kernel may leave those with a mask to another.
    assert {sample.dtype for sample in samples if "mask" not in sample.positions} == {"float32", "bfloat16", "float16"}
    _check_samples(samples)


def _check_samples(samples):
    assert {sample.dtype for sample in samples} == {"float32", "bfloat16", "float16"}
    assert {sample.drawn.arrays["x"].shape[1] for sample in samples} == {1, 7, 257}


def test_an_op_that_lists_no_samples_has_some_drawn():
    op = ops.public()["selective_scan"]._replace(samples=None)
    samples = samples_of(op)
    _check_samples(samples)
    assert set(samples[0].drawn.arrays) >= {"D", "z", "delta_bias", "initial_state"}
    assert not set(samples[1].drawn.arrays) & {"D", "z", "delta_bias", "initial_state"}
    for one, other in zip(samples, samples_of(op), strict=True):
        np.testing.assert_array_equal(one.drawn.arrays["x"], other.drawn.arrays["x"])


def _installed():
    return [name for name in ("mlx", "torch", "jax") if name in registry.installed()]


def _any():
    return registry.get(_installed()[0])


def test_every_kernel_of_a_cpu_passes(backend):
    """On JAX one op, since each shape is compiled."""
    some = ["causal_conv", "rms_norm", "linear", "block_step"]
    names = [*some, "selective_scan"] if backend.name != "jax" else some[1:]
    for op in names:
        for kernel, reason in backend.available_kernels("cpu").get(op, {}).items():
            if reason is None:
                verdict = selftest.examine(backend, op, kernel, "cpu")
                assert verdict.faults == (), (op, kernel)
                assert verdict.trials or kernel == "plain" or backend.name == "jax", (op, kernel)


# --- inside a trace ----------------------------------------------------------------------------------------


def test_torch_compile_takes_the_verdict_for_a_constant(runs, one_trial, monkeypatch):
    torch = pytest.importorskip("torch")
    backend = registry.get("torch")
    kernel = broken(backend, monkeypatch, "wrong numbers")
    arrays = _torch_arrays(torch)
    compiled = torch.compile(_scan_of(backend), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="fails its self-test"):
        y = compiled(*arrays)
    assert runs == [("selective_scan", "native"), ("selective_scan", "chunked")]
    tried = kernel.calls
    assert relative_l2(y, _scan_of(backend)(*arrays, kernel="plain")) < 1e-6
    assert kernel.calls == tried


def _torch_arrays(torch):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 5, 3), (1, 5, 3), (3, 2), (1, 5, 2), (1, 5, 2))
    x, delta, A, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, delta.abs(), -A.exp(), B, C


def _scan_of(backend):
    function = backend.op("selective_scan").selective_scan
    return lambda *arrays, kernel="auto": function(*arrays, kernel=kernel)


def test_no_mode_of_the_caller_reaches_a_trial_of_torch(runs, one_trial):
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, (x, *others) = registry.get("torch"), _torch_arrays(torch)
    run = _scan_of(backend)
    modes = {
        "grad": lambda: torch.func.grad(lambda x: run(x, *others).sum())(x),
        "vmap": lambda: torch.vmap(lambda x: run(x, *others))(x[None]),
        "no_grad": lambda: _within(torch.no_grad(), lambda: run(x, *others)),
        "inference": lambda: _within(torch.inference_mode(), lambda: run(x, *others)),
        "autocast": lambda: _within(torch.autocast("cpu"), lambda: run(x, *others)),
        "fake": lambda: _within(FakeTensorMode(allow_non_fake_inputs=True), lambda: run(x, *others)),
    }
    for name, call in modes.items():
        selftest.forget()
        cached = selftest._path(backend, "selective_scan", "native", "cpu")
        cached.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
        assert len(runs) == 1, name
        # A verdict is kept only if there was a trial.
        assert json.loads(cached.read_bytes())["faults"] == [], name
        runs.clear()


def _within(context, call):
    with context:
        return call()


def test_a_trial_is_no_part_of_what_jax_compiles(runs, one_trial, monkeypatch):
    jax = pytest.importorskip("jax")
    backend = registry.get("jax")
    arrays = [jax.numpy.asarray(value.numpy()) for value in _torch_arrays(pytest.importorskip("torch"))]
    run = _scan_of(backend)
    text = jax.jit(run).lower(*arrays).as_text()
    assert runs[0] == ("selective_scan", "native")
    done = len(runs)
    jax.clear_caches()
    monkeypatch.setattr(selftest, "TRUSTED", ("cpu",))
    assert jax.jit(run).lower(*arrays).as_text() == text
    monkeypatch.setattr(selftest, "TRUSTED", ())
    broken(backend, monkeypatch, "wrong numbers")
    _forget_all()
    for kept in selftest.cache.folder().glob("selftests/*.json"):
        kept.unlink()
    gradient = jax.jit(jax.grad(lambda x: run(x, *arrays[1:]).sum()))
    with pytest.warns(UserWarning, match="fails its self-test"):
        found = gradient(arrays[0])
    assert len(runs) == done + 1
    wanted = jax.grad(lambda x: run(x, *arrays[1:], kernel="plain").sum())(arrays[0])
    assert relative_l2(found, wanted) < 1e-5


def test_a_trial_is_no_part_of_what_mlx_compiles(runs, one_trial, monkeypatch):
    """Inside mx.compile the kernel is another, because the native one computes at once."""
    mx = pytest.importorskip("mlx.core")
    backend = registry.get("mlx")
    arrays = [mx.array(value.numpy()) for value in _torch_arrays(pytest.importorskip("torch"))]
    run = _scan_of(backend)
    chunked = backend.op("selective_scan").KERNELS["chunked"]
    compiled = mx.compile(run)
    y = compiled(*arrays)
    assert runs == [("selective_scan", "chunked")]
    assert relative_l2(np.array(y), np.array(run(*arrays, kernel="plain"))) < 1e-6
    _forget_all()
    for kept in selftest.cache.folder().glob("selftests/*.json"):
        kept.unlink()
    calls = []

    def wrong(*given):
        calls.append(given)
        y, h = chunked(*given)
        return y * 1.01, h

    monkeypatch.setitem(backend.op("selective_scan").KERNELS, "chunked", wrong)
    compiled = mx.compile(mx.grad(lambda x: run(x, *arrays[1:]).sum()))
    with pytest.warns(UserWarning, match="kernel 'chunked' of selective_scan fails its self-test"):
        found = compiled(arrays[0])
    wanted = mx.grad(lambda x: run(x, *arrays[1:], kernel="plain").sum())(arrays[0])
    assert relative_l2(np.array(found), np.array(wanted)) < 1e-5
    assert all(isinstance(call[1], mx.array) for call in calls)


# --- the ops of torch that choose by themselves ------------------------------------------------------------


def test_fused_kernels_of_torch_that_fail_are_passed_over(monkeypatch):
    torch = pytest.importorskip("torch")
    from mamba_core.backends.torch.kernels import native_norm, triton_norm
    from mamba_core.backends.torch.ops import block_step, cross_entropy, fused_mixer, gated_norm, rms_norm

    asked, verdicts = [], {"passes": True}

    def passes(backend, op, kernel, device):
        asked.append((op, kernel))
        return verdicts["passes"]

    monkeypatch.setattr(selftest, "passes", passes)
    monkeypatch.setattr(triton_norm, "reason", lambda *_: None)
    monkeypatch.setattr(cross_entropy.triton, "reason", lambda *_: None)
    monkeypatch.setattr(fused_mixer, "_reason", lambda *_: None)
    monkeypatch.setattr(gated_norm.triton_gated_norm, "reason", lambda *_: None)
    monkeypatch.setattr(native_norm, "reason", lambda *_: "not here")
    x, weight = torch.zeros(1, 2, 8), torch.zeros(8)

    def chosen(policy):
        return [
            rms_norm.fused_kernel(policy, x, weight) == "triton",
            cross_entropy.fuses_head(policy.of("cross_entropy"), weight),
            fused_mixer.is_fused(policy, x, 4, 16),
            block_step.takes_cuda(policy.of("block_step"), weight.device),
            gated_norm.is_fused(policy.of("gated_norm"), x, x, weight, 2),
        ]

    auto = kernels.Kernels()
    assert chosen(auto) == [True] * 5
    verdicts["passes"] = False
    assert chosen(auto) == [False] * 5
    assert len(asked) == 10
    names = {"rms_norm": "triton", "cross_entropy": "triton", "fused_mixer": "triton", "block_step": "cuda"}
    names |= {"gated_norm": "triton"}
    assert chosen(kernels.Kernels(tuple(names.items()))) == [True] * 5
    assert len(asked) == 10, "a kernel that is named is not asked for"


PRECISION = """
    import torch
    from mamba_core.backends import torch as backend

    torch.set_float32_matmul_precision("medium")
    with backend.on_device("cuda:0"):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "medium"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with backend.on_device("cuda:0"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""


def test_a_trial_of_torch_multiplies_in_float32():
    """A user's TF32 would make a right kernel and its plain twin differ."""
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PRECISION)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_to_ask_costs_a_look_up():
    selftest._known["torch", "selective_scan", "cuda", "gpu"] = True
    key = ("torch", "selective_scan", "cuda", "gpu")
    asked, look_up = functools.partial(selftest.passes, *key), functools.partial({key: True}.get, key)

    # By turns, so that a busy machine slows both; a trial, or a look at the disk, would be a hundred look-ups or more.
    least, floor = (min(times) for times in zip(*[_seconds(asked, look_up) for _ in range(20)], strict=True))
    assert least < 50 * floor


def _seconds(*functions) -> list[float]:
    return [timeit.timeit(function, number=200) for function in functions]
