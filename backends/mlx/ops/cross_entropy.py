"""Cross-entropy of logits against target ids."""

import functools

import mlx.core as mx
import mlx.nn as nn

from mamba_core.kernels import choose


def cross_entropy(logits: mx.array, targets: mx.array, *, kernel: str = "auto") -> mx.array:
    """logits (b, l, v), targets (b, l) int -> (b, l), the loss of each position."""
    return KERNELS[chosen(kernel)](logits, targets)


def kernels(device: str | None = None, dtype: mx.Dtype | None = None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS)


@functools.cache
def chosen(kernel: str) -> str:
    """The kernel of that name, or for "auto" the fastest.

    Raises:
        ValueError: there is no such kernel.
    """
    return choose(kernel, kernels(), "cross_entropy")


def plain(logits, targets):
    return nn.losses.cross_entropy(logits, targets)


KERNELS = {"plain": plain}
