"""Where mixtures of experts leave the logits of their routers, for a loss that reads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_COLLECTED: ContextVar[list[Any] | None] = ContextVar("collected", default=None)


@contextmanager
def collected() -> Iterator[list[Any]]:
    """Inside, a model's call adds to the list the logits (b, l, experts) of each router, in the order of the layers."""
    token = _COLLECTED.set(found := [])
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


def collecting() -> list[Any] | None:
    """The list that a call is to add to, or None where nobody asked."""
    return _COLLECTED.get()
