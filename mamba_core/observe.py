"""Reporting the values of nodes from inside a model, so that a layer can write `x = observe("conv", conv(x))`."""

from collections.abc import Callable
from typing import Any

Report = Callable[[str, Any], Any]


def reporting(observe: Callable[[str, Any], None] | None) -> Report:
    """A function of a node's name and value that tells `observe`, if there is one, and returns the value."""
    if observe is None:
        return unobserved

    def report(name, value):
        observe(name, value)
        return value

    return report


def unobserved(name: str, value):
    return value


def within(prefix: str, report: Report) -> Report:
    """The same for nodes whose names begin with a prefix."""
    return report if report is unobserved else lambda name, value: report(prefix + name, value)
