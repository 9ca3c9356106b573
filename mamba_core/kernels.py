"""Which kernel computes each op: a policy, the same on every backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mamba_core import selftest
from mamba_core.selftest import CannotRunError

# The op that a bare kernel's name is of, and the op that such a name leaves alone.
NAMED, APART = "selective_scan", "linear"
# Ops that not every backend has kernels for. A policy that leaves them to the backend is one for all backends.
OF_SOME = ("block_step", "fused_mixer", "gated_norm", "ssd_step", "swiglu")
# What a bare name means for the ops that have no kernel of that name.
ALONG = {"cuda": "triton"}


@dataclass(frozen=True)
class Kernels:
    """A kernel's name for each op, "auto" for the fastest that runs, "plain" for the framework's own operations.

    "plain" kernels are differentiable any number of times and in forward mode.
    """

    by_op: tuple[tuple[str, str], ...] = ()
    rest: str = "auto"

    @classmethod
    def read(cls, given: "str | Mapping[str, str] | Kernels", ops: Mapping[str, Mapping[str, str | None]]) -> "Kernels":
        """The policy that a user's `kernels` means.

        Args:
            given: "auto", "plain", or a mapping from ops to kernels, where ops that it does not name are "auto". Or the
                name of a scan kernel: every op that has a kernel of this name, or of its family (`ALONG`), that runs
                uses it, linear layers stay "auto", and the other ops are "plain". "sequential", the plain scan, is
                "plain".
            ops: op -> its kernels by name -> None where it runs, or why it does not: `Backend.available_kernels`.

        Raises:
            TypeError: it is neither a text nor a mapping from texts to texts.
            ValueError: an op or a kernel that there is not, or a kernel that cannot run. For an op that only other
                backends have kernels for, "auto" and "plain" are accepted.
        """
        if isinstance(given, Kernels):
            return given
        if isinstance(given, Mapping):
            if not all(isinstance(text, str) for pair in given.items() for text in pair):
                raise TypeError(f"kernels is {given!r}; expected a mapping from ops to kernels, both by name")
            policy = cls(tuple(given.items()))
        elif not isinstance(given, str):
            raise TypeError(f"kernels is {given!r}; expected 'auto', 'plain', a kernel's name, or a mapping by op")
        elif given in ("auto", "plain", "sequential"):
            policy = cls(rest="auto" if given == "auto" else "plain")
        else:
            policy = cls(tuple(_named(given, ops)), "plain")
        for op, name in policy.by_op:
            if op in OF_SOME and op not in ops:
                if name not in ("auto", "plain"):
                    raise ValueError(f"{op} has no kernel {name!r} on this backend; expected 'auto' or 'plain'")
                continue
            if op not in ops:
                raise ValueError(f"kernels has op {op!r}; expected some of {', '.join(ops)}")
            choose(name, ops[op], op)
        return policy

    def of(self, op: str) -> str:
        """The kernel that is asked for: a name, "auto" or "plain"."""
        for name, kernel in self.by_op:
            if name == op:
                return kernel
        return self.rest

    def __str__(self) -> str:
        named = ", ".join(f"{op}: {name}" for op, name in self.by_op)
        return f"{named}, others: {self.rest}" if named else self.rest


def choose(
    kernel: str, available: Mapping[str, str | None], op: str = NAMED, backend: str | None = None, device: Any = "cpu"
) -> str:
    """The kernel of that name, or for "auto" the first that runs; "plain" is the last, which always runs.

    Args:
        available: the op's kernels, the fastest first and the plain one last: None for one that runs, else why not.
        backend, device: where it is to run. "auto" passes over a kernel that fails its self-test there.

    Raises:
        ValueError: no such kernel, or it cannot run here.
    """
    running = [name for name, reason in available.items() if reason is None]
    if kernel == "auto":
        if backend is None or getattr(device, "type", device) in selftest.TRUSTED:
            return running[0]
        return first_passing(running, op, backend, device)
    if kernel == "plain":
        return running[-1]
    if kernel not in available:
        raise ValueError(f"{op} has no kernel {kernel!r}; expected 'auto', 'plain' or one of {', '.join(available)}")
    if kernel not in running:
        raise CannotRunError(f"kernel {kernel!r} cannot run here: {available[kernel]}; these can: {', '.join(running)}")
    return kernel


def first_passing(running: Sequence[str], op: str, backend: str, device: Any) -> str:
    """The first that passes its self-test on that device, or the last, which is the plain one."""
    for name in running[:-1]:
        if selftest.passes(backend, op, name, device):
            return name
    return running[-1]


def takes(asked: str, kernel: str, op: str, backend: str, device: Any) -> bool:
    """Whether a policy takes a kernel that runs on the device: by its name, or as "auto" where the kernel passes."""
    if asked != "auto" or getattr(device, "type", device) in selftest.TRUSTED:
        return asked in ("auto", kernel)
    return selftest.passes(backend, op, kernel, device)


def _named(kernel: str, ops: Mapping[str, Mapping[str, str | None]]):
    """Op -> kernel where one name was given for all."""
    if kernel not in ops[NAMED]:
        raise ValueError(
            f"no kernel {kernel!r}; expected 'auto', 'plain', one of {', '.join(ops[NAMED])}, or a mapping by op"
        )
    yield NAMED, kernel
    for op, names in ops.items():
        if op == APART:
            yield op, "auto"
        elif op != NAMED:
            running = [name for name in (kernel, ALONG.get(kernel, kernel)) if name in names and names[name] is None]
            yield from ((op, name) for name in running[:1])
