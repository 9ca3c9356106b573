"""Models without a head: the normalised residual stream of token ids."""

from mamba_core.tasks.base import Task

__all__ = ["Task"]
