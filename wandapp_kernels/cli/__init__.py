"""The command line: the only part that prints."""

from wandapp_kernels.cli.main import main

__all__ = ["main"]
