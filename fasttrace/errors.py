"""The errors a user can meet: one class per remedy, each message a full sentence."""

from __future__ import annotations


class FasttraceError(Exception):
    """Something went wrong that the message explains; the CLI prints it and exits with 1."""


class UsageError(FasttraceError, ValueError):
    """The call is wrong (unknown site, subject not in the prompt, ...); the CLI exits with 2."""


class ModelError(FasttraceError):
    """The model can't be loaded, or can't be traced as it stands (meta weights, offloaded, NaN)."""


class StoreError(FasttraceError):
    """The output directory can't be used: damaged, full, foreign, or made by another plan."""
