"""A process of our own that answers questions, for what may end a process: a line of JSON each way."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Importing torch and making a CUDA context are part of the first answer.
ANSWER_SECONDS = 120.0
_END_SECONDS = 10.0


class ChildError(Exception):
    """The child gave no answer; the message says why.

    Attributes:
        lasting: whether the question is to blame, so that the next attempt would end the same.
    """

    def __init__(self, message: str, lasting: bool = True):
        super().__init__(message)
        self.lasting = lasting


class Child:
    """Runs ``command`` from the first question on, and again after it has ended.

    The child answers each line of its input with one line on its output. It ends when its input is closed, after an
    answer that holds ``"ends": true``, and may end with status 0 at any time between answers. Several threads may ask,
    one after another; a forked process gets a child of its own.
    """

    def __init__(self, command: Sequence[str], seconds: float = ANSWER_SECONDS):
        """``seconds``: how long a question may take, starting the child included."""
        self._command, self._seconds = list(command), seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None
        self._owner = 0
        atexit.register(self.close)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer.

        Raises:
            ChildError: the child cannot be started, died, or did not answer in time.
        """
        with self._lock:
            answer = self._exchange(question)
            # None: it left while it had nothing to do, in the moment it was asked.
            answer = self._exchange(question) if answer is None else answer
        if answer is None:
            raise ChildError("the process ended without an answer")
        return answer

    def close(self) -> None:
        """End the child, which nobody is asking; the next question starts another one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def _exchange(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        process = self._running()
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(process.stdout.readline()), daemon=True)  # type: ignore
        try:
            with contextlib.suppress(OSError):  # a child that is gone shows in what it answers
                process.stdin.write(json.dumps(dict(question)) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            reader.start()
            reader.join(self._seconds)
            if reader.is_alive():
                raise ChildError(f"no answer within {self._seconds:g} seconds")
            if lines and lines[0].endswith("\n"):
                answer: dict[str, Any] = json.loads(lines[0])
                if answer.pop("ends", False):
                    self.close()
                return answer
            status = process.wait(_END_SECONDS)
            if status:
                # SIGKILL comes from outside: a host short of memory, not this question.
                raise ChildError(
                    f"the process died ({_ending(status)}){self._last_words()}", lasting=status != -signal.SIGKILL
                )
        except BaseException as error:
            # Whatever it answers later must not be taken for the answer to another question.
            process.kill()
            self.close()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ChildError("the process closed its output and did not end") from error
            if isinstance(error, ValueError):
                raise ChildError(f"its answer cannot be read: {lines[0].strip()[:200]}") from error
            raise
        self.close()
        return None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self.close()
        # The child runs the code of this process, however it came to import it.
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the child
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            errors.close()
            raise ChildError(f"a process cannot be started: {error}", lasting=False) from error
        self._errors, self._owner = errors, os.getpid()
        return self._process

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f": {' '.join(lines[-1].split())[:200]}" if lines else ""


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def module_command(module: str) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, "-m", module]
