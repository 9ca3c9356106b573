"""The name that mambapy's README has for its module jamba."""

from mamba_core.compat.mambapy.jamba import *  # noqa: F403
