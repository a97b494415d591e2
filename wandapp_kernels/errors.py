"""Errors a user can act on. Each message is one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class WandappError(Exception):
    """Base of all errors the command line reports as one sentence (exit code 1)."""


class UsageError(WandappError):
    """The request itself is wrong: an unknown method, an impossible sparsity (exit code 2)."""


class ModelError(WandappError):
    """The model cannot be loaded, has no decoder blocks, or uses a layout that is not understood."""


class TextError(WandappError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class NonFiniteError(WandappError):
    """A weight, activation, gradient or score is NaN or infinite."""


class CheckpointError(WandappError):
    """A checkpoint folder cannot be written or is not what it claims to be."""


class SparsityError(WandappError):
    """A weight breaks its sparsity pattern, or a compressed weight is not what it claims to be."""


class KernelError(WandappError):
    """A GPU kernel, or a model's decode step, cannot be compiled, loaded or launched with what it was given."""
