"""Where mixtures of experts leave the logits of their routers, for the loss that reads them in training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_COLLECTED: ContextVar[list[Any] | None] = ContextVar("collected", default=None)


@contextmanager
def collected() -> Iterator[list[Any]]:
    """Inside, a model's call adds to the list the logits (b, l, experts) of each router, in the order of the layers."""
    found: list[Any] = []
    token = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


def collecting() -> list[Any] | None:
    """The list that a call is to add to, or None where nobody asked."""
    return _COLLECTED.get()


def objective(config: Any, loss: Callable[[], Any], balance_loss: Callable[[list[Any], int], Any]) -> Any:
    """What training makes small: the task's loss, and of a config with `balance` the weighted loss of its routers.

    loss: calls the model. balance_loss: (logits of each router, top_k) -> that loss.

    Raises:
        RuntimeError: a router did not leave its logits.
    """
    if (balance := config.balance) is None:
        return loss()
    with collected() as routers:
        value = loss()
    if len(routers) != balance.layers:
        raise RuntimeError(
            f"{len(routers)} routers of {balance.layers} have left their logits for router_aux_loss_coef; expected a "
            "model whose mixtures of experts are as they were built, or router_aux_loss_coef=0"
        )
    return value + balance.coefficient * balance_loss(routers, balance.top_k)
