from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wandapp_kernels.checkpoint import atomic
from wandapp_kernels.checkpoint.atomic import check_file, check_target, new_folder, write_text_atomic
from wandapp_kernels.errors import CheckpointError


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


NEW = {"a.txt": "new", "sub/b.txt": "new"}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("old")
    return target


@pytest.mark.parametrize("state", ["absent", "no parents", "empty"])
def test_a_folder_appears_complete(tmp_path, state):
    target = tmp_path / "deep" / "er" / "out" if state == "no parents" else tmp_path / "out"
    if state == "empty":
        target.mkdir()
    with new_folder(target) as partial:
        fill(partial)
        assert partial.parent == target.parent
        assert not target.exists() or not any(target.iterdir())
    assert contents(target) == NEW
    assert os.listdir(target.parent) == ["out"]


def test_the_folder_follows_the_umask(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as partial:
        fill(partial)
        raise error
    assert os.listdir(tmp_path) == []


def test_content_is_refused_before_the_body_runs(full):
    ran = []
    with pytest.raises(CheckpointError, match=r"not empty.*--force"), new_folder(full):
        ran.append(True)
    assert not ran
    assert contents(full) == {"precious.txt": "old"}


def test_force_replaces_everything(full, tmp_path):
    with new_folder(full, force=True) as partial:
        fill(partial)
        assert contents(full) == {"precious.txt": "old"}
    assert contents(full) == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_an_exception_under_force_keeps_the_old_folder(full, tmp_path):
    with pytest.raises(RuntimeError), new_folder(full, force=True) as partial:
        fill(partial)
        raise RuntimeError
    assert contents(full) == {"precious.txt": "old"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(5, "broken disk"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_when_the_last_rename_fails(full, tmp_path, monkeypatch, error):
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            raise error
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", failing)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), new_folder(full, force=True) as partial:
        fill(partial)
    assert contents(full) == {"precious.txt": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="could not be put"), new_folder(target) as partial:
        fill(partial)
        target.mkdir()
        (target / "other.txt").write_text("somebody else")
    assert contents(target) == {"other.txt": "somebody else"}
    assert os.listdir(tmp_path) == ["out"]


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(atomic.os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(atomic.os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("the names behind file descriptors are read from /proc")
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {str(p) for p in (partial, partial / "a.txt", partial / "sub", partial / "sub" / "b.txt")}
    assert after == [str(tmp_path)]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="is a file"):
            check_target(tmp_path / "out", force)
    with pytest.raises(CheckpointError, match=r"not a writable folder|cannot be"):
        check_target(tmp_path / "out" / "below")


def test_a_file_is_checked_before_it_is_written(tmp_path):
    (tmp_path / "old.json").write_text("x")
    for path in ("old.json", "new.json", "below/further/new.json"):
        check_file(tmp_path / path)
    check_file("/dev/stdout")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    with pytest.raises(CheckpointError, match="is a folder; name a file"):
        check_file(tmp_path)
    with pytest.raises(CheckpointError, match="not a writable folder"):
        check_file(tmp_path / "old.json" / "below.json")


@pytest.mark.parametrize("path", ["/", "/proc"])
def test_mount_points_are_refused(path):
    with pytest.raises(CheckpointError, match="mount point"):
        check_target(path, force=True)


def test_the_current_and_the_home_folder_are_never_replaced(tmp_path, monkeypatch):
    home, here = tmp_path / "people" / "me", tmp_path / "work" / "here"
    home.mkdir(parents=True), here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for path in (".", "..", here, home, home.parent):
        with pytest.raises(CheckpointError, match="current or the home folder"):
            check_target(path, force=True)
    check_target("new", force=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="not a writable folder"):
        check_target(tmp_path / "out")


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as partial:
        fill(partial)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == NEW


WRITER = """
import sys, time, types
from pathlib import Path
package, target, mode = sys.argv[1:]
# Without the package's own __init__, which imports torch and transformers.
sys.modules["wandapp_kernels"] = types.ModuleType("wandapp_kernels")
sys.modules["wandapp_kernels"].__path__ = [package]
from wandapp_kernels.checkpoint.atomic import new_folder
version = 0
while True:
    version += 1
    with new_folder(Path(target), force=True) as partial:
        (partial / "config.json").write_text(str(version))
        (partial / "model.safetensors").write_text(str(version) * 100_000)
        if mode == "hang":
            print("ready", flush=True)
            time.sleep(600)
        (partial / "wandapp.json").write_text(str(version))
    print("written", flush=True)
"""


def start(target: Path, mode: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", WRITER, str(Path(atomic.__file__).parents[1]), str(target), mode]
    writer = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline().strip() in ("ready", "written")
    return writer


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("existing", [False, True])
def test_kill_in_the_middle_of_writing(tmp_path, existing):
    target = tmp_path / "out"
    if existing:
        target.mkdir()
        (target / "precious.txt").write_text("old")
    kill(start(target, "hang"))
    leftovers = [path.name for path in tmp_path.iterdir() if path != target]
    assert len(leftovers) == 1 and leftovers[0].startswith(".out.tmp-")
    assert contents(target) == {"precious.txt": "old"} if existing else not target.exists()
    with new_folder(target, force=existing) as partial:
        fill(partial)
    assert contents(target) == NEW


def test_kill_at_any_moment_leaves_a_whole_folder_or_none(tmp_path):
    target, moments = tmp_path / "out", random.Random(0)
    for _ in range(6):
        writer = start(target, "loop")
        time.sleep(moments.uniform(0, 0.05))
        kill(writer)
        if target.exists():
            found = contents(target)
            version = found["config.json"]
            whole = {"config.json": version, "model.safetensors": version * 100_000, "wandapp.json": version}
            assert found == whole


def test_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_text_atomic(path, "one\n")
    write_text_atomic(path, "zwei ‖X‖\n")
    assert path.read_text(encoding="utf-8") == "zwei ‖X‖\n"
    assert os.listdir(path.parent) == ["result.json"]


def test_text_is_kept_when_the_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_text_atomic(path, "old")

    def failing(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_text_to_a_folder_or_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a folder"):
        write_text_atomic(tmp_path, "x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_text_atomic(tmp_path / "file" / "below", "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_text_to_a_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text_atomic(pipe, "hello")
        assert os.read(reader, 100) == b"hello"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
