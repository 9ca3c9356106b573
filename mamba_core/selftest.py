"""Self-tests of kernels: does a kernel compute its op on this device as the op's plain kernel does?

"auto" asks `passes` where it chooses a kernel on an accelerator. The first time on a kind of device, the kernel is
tried with a few calls: every option, gradients, odd sizes, the compute dtypes. Where each takes seconds to compile, the
backend's file of the op says which are enough (`TRIED`). The verdict is kept in the user's cache, until the device, a
version or a source changes. A kernel that fails is passed over with one warning. A kernel that the user names is not
tried, and neither is one on a CPU, where this project's tests have run. `mamba-core doctor` tries every kernel with all
calls.

A trial runs in a thread of its own, where neither a trace of torch.compile, jax.jit or mx.compile nor a setting of the
caller's thread reaches it. What a kernel does to its process, such as ending it, it does to the caller's too. A file in
the cache says that a trial is under way: a kernel under which `DEATHS` processes have ended has failed. So has one
whose trial does not end within `LONGEST` seconds.
"""

import functools
import hashlib
import importlib
import json
import os
import queue
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core import cache, registry
from mamba_core.spec import ops
from mamba_core.spec.ops.base import Op, Sample, samples_of
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.version import VERSION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Devices whose kernels "auto" takes untried.
TRUSTED = ("cpu",)
SWITCH = "MAMBA_CORE_SELFTEST"
LONGEST = 300.0
# Files that a verdict depends on.
SOURCES = (".py", ".cu", ".h", ".cpp")
# A fault of the moment, which is not kept.
OUT_OF_MEMORY = re.compile(r"out of memory|OUT_OF_MEMORY|RESOURCE_EXHAUSTED", re.IGNORECASE)
DIED = "the processes that tried it before ended during the trial"
# So many processes that ended are the kernel's fault: one may have been killed for another reason.
DEATHS = 2
ENDLESS = f"it did not end within {LONGEST:.0f} s"


class CannotRunError(ValueError):
    """A kernel that was named cannot run on that device, or not for these arguments."""


class Trial(NamedTuple):
    """A call that a kernel and its plain twin compute alike.

    name: what it tries. dtype: the compute dtype, whose tolerances hold.
    arrays: by name, float64 NumPy and the dtype in which it is given; they are differentiated.
    outputs: the shapes and dtypes of what `call` returns, by name.
    call: (kernel, *arrays of the backend) -> a tuple of arrays.
    reference: (arrays in float64, cotangents) -> (outputs, gradients by name); None where nothing else tells.
    forward_only: kernels without a gradient.
    """

    name: str
    dtype: str
    arrays: Mapping[str, tuple[np.ndarray, str]]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]
    call: Callable
    reference: Callable | None = None
    forward_only: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """faults: what was wrong, one a trial. trials: how many there were. skipped: those that there could not be.

    lasting: whether it would be the same the next time, as far as one can tell.
    """

    faults: tuple[str, ...] = ()
    trials: int = 0
    skipped: tuple[str, ...] = ()
    lasting: bool = True


# (backend, op, kernel, device) -> whether "auto" may take it.
_known: dict[tuple[str, str, str, Any], bool] = {}
_lock = threading.Lock()
_own = threading.local()


def passes(backend: str, op: str, kernel: str, device: Any) -> bool:
    """Whether "auto" may take the kernel on the device; tries it where that is not known."""
    known = _known.get((backend, op, kernel, device))
    return _settle(backend, op, kernel, device) if known is None else known


def forget() -> None:
    """Ask the cache, or try again, when "auto" next chooses."""
    _known.clear()


def _settle(backend_name: str, op: str, kernel: str, device: Any) -> bool:
    if getattr(_own, "trying", False):
        return True
    backend = registry.get(backend_name)
    if getattr(backend, "is_capturing", bool)():
        # Nothing else may run on the device now. The warm-up before, or the next call, tries it.
        return True
    key = (backend_name, op, kernel, device)
    with _lock:
        if key in _known:
            return _known[key]
        verdict = _verdict(backend, op, kernel, str(device))
        _known[key] = not verdict.faults
    if verdict.faults:
        _warn(backend, op, kernel, str(device), verdict)
    return not verdict.faults


def _verdict(backend, op: str, kernel: str, device: str) -> Verdict:
    switch = os.environ.get(SWITCH)
    if switch == "0" or kernel in getattr(backend.op(op), "UNTRIED", ()):
        return Verdict()
    if facts_of(backend, device) is None:  # it is compiled for a machine elsewhere
        return Verdict()
    return settled(backend, op, kernel, device, again=switch == "1")


def _warn(backend, op: str, kernel: str, device: str, verdict: Verdict) -> None:
    facts = facts_of(backend, device) or {}
    warnings.warn(
        f"kernel {kernel!r} of {op} fails its self-test with {backend.name} on {facts.get('device', device)}, and the "
        f"next kernel is used: {verdict.faults[0]}. Please report it with the file that `mamba-core doctor` writes",
        stacklevel=2,
    )


# --- verdicts that are kept ------------------------------------------------------------------------


def settled(backend, op: str, kernel: str, device: str, again: bool = False) -> Verdict:
    """The verdict that is kept, or else a new one, which is kept.

    again: try it in any case, and to the end where something is wrong.
    """
    path = _path(backend, op, kernel, device)
    if not again and (kept := _read(path)) is not None:
        return kept
    mark = _Mark(path)
    if mark.was_left and not again:
        mark.release()
        return Verdict((DIED,))
    verdict = None
    try:
        verdict = _apart(lambda: examine(backend, op, kernel, device, to_the_end=again))
    finally:  # an interrupt says nothing about the kernel
        if verdict is None or verdict.faults != (ENDLESS,):
            mark.remove()
    if path is not None and verdict.trials and verdict.lasting:
        told = {"faults": verdict.faults, "trials": verdict.trials, "of": _key(backend, op, kernel, device)}
        cache.keep(path, json.dumps(told, indent=1).encode())
    return verdict


def _path(backend, op: str, kernel: str, device: str) -> Path | None:
    """Where the verdict is kept; None where nothing can be."""
    text = json.dumps(_key(backend, op, kernel, device), sort_keys=True)
    try:
        return cache.folder() / "selftests" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    except RuntimeError:
        return None


def _key(backend, op: str, kernel: str, device: str) -> dict[str, str]:
    """What a verdict holds for."""
    known = {"backend": backend.name, "op": op, "kernel": kernel, "on": device.partition(":")[0]}
    return known | {"mamba_core": VERSION, "sources": _sources(backend, op)} | dict(facts_of(backend, device) or {})


def facts_of(backend, device: str) -> Mapping[str, str] | None:
    """The device's name and the versions that its kernels depend on; None where there is no such device here."""
    if not hasattr(backend, "device_facts"):
        return {"device": device}
    try:
        return backend.device_facts(device)
    except (RuntimeError, ValueError, AssertionError):
        return None


def _sources(backend, op: str) -> str:
    """A digest of the files of the op's backend, of the kernels without a framework, and of the ops' float64 form."""
    files = [getattr(backend.op(op), "__file__", None), __file__, ops.__file__]
    folders = [Path(file).parents[1] for file in files[:1] if file] + [Path(ops.__file__).parent]
    for name in ("gpu", "native"):
        folders += map(Path, importlib.import_module(f"mamba_core.backends.{name}").__path__)
    return _digest(tuple(folders), Path(__file__))


@functools.cache
def _digest(folders: tuple[Path, ...], *files: Path) -> str:
    digest = hashlib.sha256()
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in SOURCES]
    for path in (*found, *files):
        with suppress(OSError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _read(path: Path | None) -> Verdict | None:
    """None where there is none, or a damaged one."""
    try:
        kept = json.loads(path.read_bytes()) if path is not None else None
        if kept is None or not all(isinstance(fault, str) for fault in kept["faults"]):
            return None
        return Verdict(tuple(kept["faults"]), int(kept["trials"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Mark:
    """A file that is there while a kernel is tried, locked by the process that tries it. Each adds a line.

    was_left: whether `DEATHS` processes left one, and have ended.
    """

    LINE = b"a trial is under way\n"

    def __init__(self, path: Path | None):
        self._path = None if path is None else path.with_suffix(".running")
        self._descriptor = self._opened()
        self.was_left = False
        if self._descriptor is not None:
            with suppress(OSError):
                self.was_left = os.fstat(self._descriptor).st_size >= DEATHS * len(self.LINE)
                os.write(self._descriptor, self.LINE)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def remove(self) -> None:
        if self._descriptor is not None and self._path is not None:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                self._path.unlink()
            self.release()

    def _opened(self) -> int | None:
        """None where it cannot be, or another process is trying the kernel now."""
        if self._path is None or fcntl is None:
            return None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor


# --- trials ----------------------------------------------------------------------------------------


def _apart(run: Callable[[], Verdict]) -> Verdict:
    """What a function returns that is called in a thread of its own."""
    done: queue.SimpleQueue[Verdict] = queue.SimpleQueue()

    def target():
        _own.trying = True
        try:
            done.put(run())
        except BaseException as fault:
            done.put(Verdict((f"the self-test raises {_told(fault)}",), lasting=False))

    threading.Thread(target=target, name="mamba_core self-test", daemon=True).start()
    try:
        return done.get(timeout=LONGEST)
    except queue.Empty:
        return Verdict((ENDLESS,), lasting=False)


def examine(backend, op: str, kernel: str, device: str, to_the_end: bool = True) -> Verdict:
    """Try a kernel here and now, until a fault or to the end.

    It is right where it equals the float64 reference, or the plain kernel: a device may round more than the reference
    allows, and then it does so in both kernels. The plain kernel has the reference alone.
    """
    is_plain = kernel == list(backend.available_kernels(device)[op])[-1]
    chosen = None if to_the_end else getattr(backend.op(op), "TRIED", {}).get(kernel)
    faults: list[str] = []
    skipped, count, lasting = [], 0, True
    with backend.on_device(device) if hasattr(backend, "on_device") else nullcontext():
        for number, trial in enumerate(trials(backend, op, device)):
            if faults and not to_the_end:
                break
            if chosen is not None and number not in chosen:
                continue
            if is_plain and trial.reference is None:
                continue
            given, cotangents = _drawn(backend, trial, device)
            run = functools.partial(_results, backend, trial, given, cotangents)
            try:
                found = run(kernel)
            except CannotRunError as fault:
                skipped.append(f"{trial.name}: {fault}")
                continue
            except Exception as fault:
                if not is_plain and _raises(lambda: run("plain")):  # noqa: B023 (called at once)
                    skipped.append(f"{trial.name}: the plain kernel raises too, {_told(fault)}")
                    continue
                faults.append(f"{trial.name}: it raises {_told(fault)}")
                lasting = lasting and not (isinstance(fault, MemoryError) or OUT_OF_MEMORY.search(str(fault)))
            else:
                faults += _differences(backend, trial, given, cotangents, found, None if is_plain else run)
            count += 1
    return Verdict(tuple(faults), count, tuple(skipped), lasting)


def trials(backend, op: str, device: str) -> list[Trial]:
    """Those of the backend's file of the op, or else of the op's float64 form; none where neither says any."""
    own = getattr(backend.op(op), "trials", None)
    if own is not None:
        return list(own(device))
    known = ops.public().get(op)
    return [] if known is None else [_trial(backend, known, sample, device) for sample in samples_of(known)]


def _trial(backend, op: Op, sample: Sample, device: str) -> Trial:
    (arrays, options), positions = sample.drawn, sample.positions

    def stored(name):
        return "float32" if name in op.float32 else sample.dtype

    def call(kernel, *values):
        where = {name: backend.from_numpy(value, device=device) for name, value in positions.items()}
        named = dict(zip(arrays, values, strict=True)) | where | options
        return getattr(backend.op(op.name), op.name)(**named, return_final_state=True, kernel=kernel)

    def reference(values, cotangents):
        named = values | positions | options
        return op.forward(**named, return_final_state=True), op.vjp(*cotangents, **named)

    sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arrays.items())
    switches = "".join(f", {name}={value}" for name, value in options.items()) + "".join(f", {n}" for n in positions)
    return Trial(
        name=f"{sample.dtype} {sizes}{switches}",
        dtype=sample.dtype,
        arrays={name: (value, stored(name)) for name, value in arrays.items()},
        outputs={
            "y": (arrays["x"].shape, sample.dtype),
            "final_state": (op.state_shape(arrays), stored("final_state")),
        },
        call=call,
        reference=reference,
    )


def _drawn(backend, trial: Trial, device: str) -> tuple[dict[str, Any], list]:
    """The arrays, and the gradients of the outputs."""
    rng = np.random.default_rng(0)

    def array(value, dtype):
        return backend.from_numpy(value.astype(np.float32), dtype=dtype, device=device)

    given = {name: array(value, dtype) for name, (value, dtype) in trial.arrays.items()}
    return given, [array(rng.normal(size=shape), dtype) for shape, dtype in trial.outputs.values()]


def _results(backend, trial: Trial, given, cotangents, kernel: str) -> dict[str, np.ndarray]:
    """Outputs and gradients by name."""
    call = functools.partial(trial.call, kernel)
    if kernel in trial.forward_only:
        found = call(*given.values())
        return {name: backend.to_numpy(value) for name, value in zip(trial.outputs, found, strict=True)}
    outputs, gradients = backend.vjp(call, list(given.values()), cotangents)
    named = dict(zip(trial.outputs, outputs, strict=True))
    return named | {f"gradient of {name}": value for name, value in zip(given, gradients, strict=True)}


def _differences(backend, trial: Trial, given, cotangents, found, plain: Callable | None) -> list[str]:
    """The worst difference from the reference or the plain kernel, if it is too large."""
    told = []
    if trial.reference is not None:
        values = {name: backend.to_numpy(value).astype(np.float64) for name, value in given.items()}
        outputs, gradients = trial.reference(values, [backend.to_numpy(dy).astype(np.float64) for dy in cotangents])
        wanted = dict(zip(trial.outputs, outputs, strict=True))
        wanted |= {f"gradient of {name}": gradients[name] for name in given}
        told = _worst(trial, found, wanted, "reference", 1.0)
    if plain is not None and (told or trial.reference is None):
        # Each of the two may be as far from the truth as the table says.
        told = _worst(trial, found, plain("plain"), "plain kernel", 2.0)
    return told


def _worst(trial: Trial, found: Mapping, wanted: Mapping, other: str, times: float) -> list[str]:
    worst, told = 1.0, []
    for name, value in found.items():
        expected = wanted[name]
        if value.shape != expected.shape:
            return [f"{trial.name}: {name} has shape {value.shape}, and that of the {other} {expected.shape}"]
        limit = times * tolerance(trial.dtype, "gradient" if name.startswith("gradient") else "value")
        error = _error(value, expected)
        if not error <= worst * limit:
            worst = error / limit
            told = [f"{trial.name}: {name} is {error:.1e} from the {other}, and {limit:.0e} is allowed"]
    return told


def _error(value: np.ndarray, expected: np.ndarray) -> float:
    """The relative L2 error; the norm counts as at least that of an array of ones, which is what rounding is of."""
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    scale = max(norm, expected.size**0.5)
    return relative_l2(value, expected) * (norm / scale if norm > 0 else 1 / scale) if expected.size else 0.0


def _raises(call: Callable) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


def _told(fault: BaseException) -> str:
    """The exception in a line, without paths."""
    text = " ".join(without_paths(str(fault)).split())
    return f"{type(fault).__name__}: {text[:500]}" if text else type(fault).__name__


def without_paths(text: str) -> str:
    """The text with each absolute path cut down to its last part, and home folders to "~": they name people."""
    with suppress(RuntimeError):
        text = text.replace(str(Path.home()), "~")
    text = re.sub(r"(/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s:'\"]+", "~", text)
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:\\|~?/|~\\)(?:[^\s/\\:'\"()<>,;]+[/\\])*", "", text)


# --- all of them -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """What `mamba-core doctor` says of a kernel on a device. verdict: "passed", "failed", "not tried", "cannot run"."""

    backend: str
    device: str
    op: str
    kernel: str
    verdict: str
    details: tuple[str, ...] = ()


def every(backend, kernel: str | None = None) -> list[Row]:
    """A row for each kernel of that name, or for all, of each op on each device; "" for a verdict that is to come."""
    return [
        Row(backend.name, device, op, name, "" if reason is None else "cannot run", () if reason is None else (reason,))
        for device in backend.devices()
        for op, kernels in backend.available_kernels(device).items()
        for name, reason in kernels.items()
        if kernel in (None, name)
    ]


def judged(backend, row: Row) -> Row:
    """The row with its verdict. The kernel is tried, whatever the cache says, and the cache learns of it."""
    if row.verdict:
        return row
    verdict = settled(backend, row.op, row.kernel, row.device, again=True)
    if verdict.faults:
        return row._replace(verdict="failed", details=verdict.faults)
    if not verdict.trials:
        return row._replace(verdict="not tried", details=verdict.skipped or ("there is nothing to compare it with",))
    return row._replace(verdict="passed", details=verdict.skipped)


def work(name: str, kernel: str | None, done: list[list[str]]) -> None:
    """Judge a backend's kernels but those (device, op, kernel) that are done; print JSON, a line each, for `doctor`.

    In a process of its own, because a kernel may end it.
    """

    def tell(**what):
        print(LINE + json.dumps(what), flush=True)

    try:
        backend = registry.get(name)
        rows = every(backend, kernel)
        tell(devices={device: dict(facts_of(backend, device) or {}) for device in backend.devices()})
    except Exception as fault:
        tell(fault=_told(fault))
        return
    for row in rows:
        if [row.device, row.op, row.kernel] not in done:
            tell(begin=row)
            tell(row=judged(backend, row))


# What comes before each line of `work`: a framework may print lines of its own.
LINE = "mamba_core "
