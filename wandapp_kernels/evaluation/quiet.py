"""Keeping lm-evaluation-harness and datasets quiet, whose bars and messages would drown the package's own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout

from wandapp_kernels.models.bundled import quiet_transformers

_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate")


@contextmanager
def quiet_harness() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Drop what is printed, and messages below errors, within the block.

    Yields:
        A context in which standard output and error are the caller's again, for progress.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    output, error_output = sys.stdout, sys.stderr

    @contextmanager
    def loud() -> Iterator[None]:
        with redirect_stdout(output), redirect_stderr(error_output):
            yield

    # Their bars cannot be switched off: lm-eval makes some of them without asking.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, quiet_transformers():
        try:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield loud
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
