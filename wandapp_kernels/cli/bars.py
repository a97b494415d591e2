"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from wandapp_kernels.pruning.walk import Progress

# Plain lines come at most this often, so that a log of a long run stays readable.
PLAIN_SECONDS = 10.0


class ProgressDisplay:
    """Shows ``Progress`` events on standard error."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._key: tuple[str, str] | None = None
        self._last_line = self._started = 0.0

    def __call__(self, method: str, progress: Progress) -> None:
        if self._quiet:
            return
        if self._key != (method, progress.stage):
            self.close()
            self._key, self._last_line, self._started = (method, progress.stage), 0.0, time.monotonic()
        if self._terminal:
            self._show_bar(method, progress)
        elif progress.done == progress.total or time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.line(
                f"{method}: {progress.stage} {progress.done}/{progress.total}{_loss(progress)}{self._left(progress)}"
            )

    def line(self, text: str) -> None:
        """One line of text that does not break the bar."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_bar(self, method: str, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(total=progress.total, desc=f"{method} {progress.stage}", unit="", file=sys.stderr)
        self._bar.set_postfix_str(_loss(progress).lstrip(", "), refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self.close()

    def _left(self, progress: Progress) -> str:
        spent = time.monotonic() - self._started
        if progress.done < 2 or progress.done == progress.total:
            return ""
        # The clock starts with the first event, after the first item.
        return f", about {spent / (progress.done - 1) * (progress.total - progress.done):.0f} s left"


def _loss(progress: Progress) -> str:
    return "" if progress.loss is None else f", loss {progress.loss:.2e}"
