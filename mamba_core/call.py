"""Call: the facts of one call of a model, computed once for all of its layers."""

from typing import Any, NamedTuple

from mamba_core.observe import Report, unobserved, within

Array = Any


class Call(NamedTuple):
    """What every layer is told beside its input and its state. Each backend's `positions.call_of` makes one.

    mask: (b, l) bool, False at positions that do not count; None where all count.
    segment_ids: (b, l) int, the sequence of each position; None where all are of one.
    restart: (b, l) bool, the positions at which a state restarts from zero; None where none does.
    order, inverse: (b, l) int, `values[order]` has the counting positions first, `[inverse]` undoes it; None where all
        positions count.
    one: a single position that counts, so that a layer may use the step of its ops.
    last: only the last position of the model's output is asked for.
    observe: reports the value of a node and returns it; `unobserved` where nobody listens.
    in_place: the states may be overwritten, because nobody else holds them.
    fresh: the states are those before any position, zeros.
    routers: where mixtures of experts leave their logits, (b, l, experts) each, in the order of the layers; None where
        nobody asks for them.
    reverse: the facts of the positions in reverse order, where `mask` or `segment_ids` are given and a layer may read
        them so; else None.
    """

    mask: Array | None = None
    segment_ids: Array | None = None
    restart: Array | None = None
    order: Array | None = None
    inverse: Array | None = None
    one: bool = False
    last: bool = False
    observe: Report = unobserved
    in_place: bool = False
    fresh: bool = False
    routers: list[Array] | None = None
    reverse: "Call | None" = None

    @property
    def observed(self) -> bool:
        """Whether somebody wants the value of every node."""
        return self.observe is not unobserved

    @property
    def plain(self) -> bool:
        """Whether all positions count and are of one sequence."""
        return self.mask is None and self.segment_ids is None

    def within(self, prefix: str) -> "Call":
        """The same call for nodes whose names begin with a prefix."""
        return self._replace(observe=within(prefix, self.observe)) if self.observed else self
