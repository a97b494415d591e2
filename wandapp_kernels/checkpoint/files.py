"""The files of a model folder, read without trusting them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from wandapp_kernels.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The weight files of the folder, each with the tensors the index says it holds (none without an index)."""
    if (folder / WEIGHTS).exists():
        return {_inside(folder, WEIGHTS): set()}
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise CheckpointError(
                f"{folder} has {pickled[0]} but no {WEIGHTS}; load it with transformers where you trust it and save it "
                "again as safetensors"
            )
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a saved model")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download or save the model again")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(_inside(folder, name), set()).add(tensor)
    return dict(sorted(files.items()))


def _inside(folder: Path, name: Any) -> Path:
    """The path of a weight file that must lie in ``folder``, or among the blobs of a snapshot in the hub's cache."""
    if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{INDEX} in {folder} points to {name!r}, which is not a plain file name; do not trust it"
        )
    path = folder / name
    if Path(os.path.realpath(path)).parent not in homes(folder):  # resolve() raises on a link that leads to itself
        raise CheckpointError(f"{name} in {folder} is a link that leaves the folder; copy the file into it")
    if not path.is_file():
        raise CheckpointError(f"{name} is missing from {folder}; copy or download it again")
    return path


def homes(folder: Path) -> list[Path]:
    """Where the weights of a folder may lie: the hub's cache stores files under blobs, linked from snapshots/COMMIT."""
    home = folder.resolve()
    return [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError: absent, unreadable, no object, or a key given twice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the folder of a saved model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); save or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} instead of an object; save or download it again"
        )
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's ``object_pairs_hook``: JSON itself would let the last of several equal keys win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for position, (key, _) in enumerate(pairs) if key in dict(pairs[:position]))
        raise ValueError(f"the key {twice!r} is given twice")
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what safetensors or the system says about a damaged file into one CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} in {path.parent} is not a complete safetensors file ({error}); copy or download it again"
        ) from error
