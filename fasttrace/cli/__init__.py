"""The `fasttrace` command. Importing it loads neither torch nor a model."""

from fasttrace.cli.app import main

__all__ = ["main"]
