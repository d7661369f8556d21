"""Small things with the shape of the real ones, for tests of fasttrace and of what builds on it."""

from __future__ import annotations

from fasttrace.testing.runs import runs_of, runs_of_pairs
from fasttrace.testing.tiny import tiny_clip, tiny_pipeline
from fasttrace.testing.toy import ToyDenoiser, ToyModel

__all__ = ["ToyDenoiser", "ToyModel", "runs_of", "runs_of_pairs", "tiny_clip", "tiny_pipeline"]
