"""Where converted models and other reusable files live: never inside the repository or the installed package."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for everything that can be rebuilt: `$WANDAPP_CACHE` if set, else `~/.cache/wandapp_kernels`.

    The folder is not created here; whoever writes into it does that.
    """
    chosen = os.environ.get("WANDAPP_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "wandapp_kernels"
