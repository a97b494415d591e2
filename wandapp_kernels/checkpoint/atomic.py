"""Writing a folder or a file so that it is there completely or not at all.

The content is written next to its target under a hidden name, flushed to the disk, and renamed into place::

    .out.tmp-1f3a/  --fsync-->  --rename-->  out/

A killed run leaves the hidden ``.out.tmp-*`` behind, which can be deleted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wandapp_kernels.errors import CheckpointError


def check_target(path: str | Path, force: bool = False) -> None:
    """Check that :func:`new_folder` may write to ``path``, before anything expensive is done for it.

    Args:
        path: the folder to be written; it may be absent or empty.
        force: a folder with content is accepted too, because it will be replaced.

    Raises:
        CheckpointError: ``path`` is a file, a folder with content (without ``force``), a mount point, a folder that
            holds the current or the home folder, or lies where nothing can be written.
    """
    try:
        target = Path(path).resolve()
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{path} is a file; name a folder to write to")
        if target.is_dir():
            if os.path.ismount(target):
                raise CheckpointError(f"{path} is a mount point and cannot be replaced; name a folder inside it")
            home = Path(os.path.expanduser("~")).resolve()
            if any(inside.is_relative_to(target) for inside in (Path.cwd(), home)):
                raise CheckpointError(f"{path} holds the current or the home folder; name a new folder")
            if not force and any(target.iterdir()):
                raise CheckpointError(f"{path} exists and is not empty; name a new folder, or replace it with --force")
        above = next(folder for folder in target.parents if folder.exists())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be used as a folder: {error.strerror}; name another one") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written because {above} is not a writable folder; name another place")


def check_file(path: str | Path) -> None:
    """Check that :func:`write_text_atomic` may write ``path``, before anything expensive is done for it.

    Raises:
        CheckpointError: ``path`` is a folder, or lies where nothing can be written.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file to write to")
    if target.exists() and not target.is_file():
        return  # a pipe or a device
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written because {above} is not a writable folder; name another place")


@contextmanager
def new_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Write a folder that appears at ``path`` complete and flushed to the disk, or not at all.

    Yields an empty temporary folder next to ``path`` (same file system). When the body ends, every file and folder in
    it is flushed with fsync and it is renamed to ``path``; when the body raises, it is deleted. With ``force`` a folder
    with content is first renamed aside, and deleted after the new one is in place: a crash between the two renames
    leaves nothing at ``path`` and the old content under ``.<name>.old-*``.

    Raises:
        CheckpointError: as :func:`check_target`, before the body runs; or the finished folder cannot be put in place.
    """
    check_target(path, force)
    target = Path(path).resolve()
    partial = _sibling(target, "tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; name another place") from error
    try:
        yield partial
        try:
            _flush_tree(partial)
            _put_in_place(partial, target, force)
        except OSError as error:
            raise CheckpointError(
                f"the finished folder could not be put at {path}: {error.strerror}; name another place"
            ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``: whoever reads it sees the old content or the new one, never a part.

    A pipe or device such as ``/dev/stdout`` is written to directly.

    Raises:
        CheckpointError: ``path`` is a folder, or cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error
        return
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write a file that appears at ``path`` complete and flushed to the disk, or not at all.

    Yields the path of a temporary file next to it; an old file is replaced.

    Raises:
        CheckpointError: ``path`` is a folder, or cannot be written.
    """
    partial = None
    try:
        target = Path(path)
        if target.is_dir():
            raise CheckpointError(f"{path} is a folder; name a file to write to")
        target = target.resolve()
        partial = _sibling(target, "tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        os.replace(partial, target)
        _flush(target.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink()


def _cannot_write(path: str | Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error.strerror}; name another file")


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _put_in_place(partial: Path, target: Path, force: bool) -> None:
    aside = _sibling(target, "old")
    try:
        if target.exists():
            if force and any(target.iterdir()):
                os.rename(target, aside)
            else:
                target.rmdir()  # fails if something was written there meanwhile
        os.rename(partial, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    _flush(target.parent)
    if aside.exists():
        try:
            shutil.rmtree(aside)
        except OSError as error:
            warnings.warn(f"the replaced folder was left at {aside}: {error.strerror}", stacklevel=4)


def _flush_tree(folder: Path) -> None:
    for where, _, files in os.walk(folder):
        for name in files:
            _flush(Path(where, name))
        _flush(Path(where))


def _flush(path: Path) -> None:
    # Windows flushes neither folders nor files opened for reading.
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
