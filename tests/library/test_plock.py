"""Lock files: exclusive, with the original's permissions, committed in one step."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from Milter import plock
from Milter.plock import PLock


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    path.write_text("original")
    return path


def names(base):
    return sorted(os.listdir(base.parent))


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_commit_replaces_the_original(base):
    lock = PLock(str(base))
    fp = lock.lock()
    fp.write("new ü \udcff")
    assert base.read_text() == "original"
    assert names(base) == ["base", "base.lock"]
    lock.commit()
    assert base.read_bytes() == "new ü ".encode() + b"\xff"
    assert names(base) == ["base"]
    assert fp.closed
    assert lock.fp is None


def test_paths_may_be_path_objects(base):
    lock = PLock(base)
    lock.lock(base.with_name("other.lock")).write("new")
    assert names(base) == ["base", "other.lock"]
    lock.commit(base.with_name("backup"))
    assert (base.read_text(), base.with_name("backup").read_text()) == ("new", "original")


def test_backup_is_the_old_file_itself(base):
    before = os.stat(base).st_ino
    backup = str(base) + ".old"
    for contents in ("first", "second"):
        lock = PLock(str(base))
        lock.lock().write(contents)
        lock.commit(backup)
        assert os.stat(backup).st_ino == before
        before = os.stat(base).st_ino
    assert base.read_text() == "second"
    assert names(base) == ["base", "base.old"]


def test_backup_of_a_file_that_is_its_own_backup(base):
    os.link(base, str(base) + ".old")
    lock = PLock(str(base))
    lock.lock().write("new")
    lock.commit(str(base) + ".old")
    assert base.with_suffix(".old").read_text() == "original"
    assert names(base) == ["base", "base.old"]


def test_no_original_no_backup(base):
    base.unlink()
    lock = PLock(str(base))
    lock.lock().write("new")
    lock.commit(str(base) + ".old")
    assert names(base) == ["base"]


def test_unlock_drops_what_was_written(base):
    lock = PLock(str(base))
    lock.lock().write("new")
    lock.unlock()
    lock.unlock()
    assert base.read_text() == "original"
    assert names(base) == ["base"]


def test_lock_is_exclusive(base):
    first, second = PLock(str(base)), PLock(str(base))
    first.lock()
    with pytest.raises(FileExistsError):
        second.lock()
    second.unlock()
    assert names(base) == ["base", "base.lock"]
    with pytest.raises(FileExistsError, match="already locked by this"):
        first.lock()
    with pytest.raises(FileExistsError, match="already locked by this"):
        first.wlock()
    first.commit()
    second.lock()
    second.unlock()


def test_commit_without_lock(base):
    with pytest.raises(OSError, match="not locked"):
        PLock(str(base)).commit()


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        PLock(str(tmp_path / "missing" / "base")).lock()


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o644, 0o664, 0o400])
def test_mode_of_the_original(base, wanted):
    os.chmod(base, wanted)
    lock = PLock(str(base))
    lock.lock(mode=0o666)
    assert mode(lock.lockname) == wanted
    lock.commit()
    assert mode(base) == wanted


@pytest.mark.parametrize("wanted", [None, 0o600, 0o666])
def test_mode_of_a_new_file(base, wanted):
    base.unlink()
    lock = PLock(str(base))
    old = os.umask(0o077)
    try:
        lock.lock(**({} if wanted is None else {"mode": wanted}))
    finally:
        os.umask(old)
    lock.commit()
    assert mode(base) == (wanted or 0o660)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_group_of_the_original(base):
    os.chown(base, -1, 12345)
    lock = PLock(str(base))
    lock.lock(strict_perms=True)
    lock.commit()
    assert os.stat(base).st_gid == 12345


def refuse(*args):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def other_group(base, monkeypatch):
    """Let the original seem to be of a group that the caller is not in."""
    real = os.stat(base)
    monkeypatch.setattr(
        plock.os, "stat", lambda path: os.stat_result([*real[:5], real.st_gid + 1, *real[6:10]])
    )
    monkeypatch.setattr(plock.os, "fchown", refuse)


def test_group_that_cannot_be_given_loses_its_rights(base, monkeypatch):
    os.chmod(base, 0o664)
    other_group(base, monkeypatch)
    lock = PLock(str(base))
    lock.lock()
    monkeypatch.undo()
    assert mode(lock.lockname) == 0o604
    lock.unlock()


def test_group_that_cannot_be_given_is_an_error_if_strict(base, monkeypatch):
    other_group(base, monkeypatch)
    with pytest.raises(PermissionError):
        PLock(str(base)).lock(strict_perms=True)
    monkeypatch.undo()
    assert names(base) == ["base"]


def test_lock_file_is_never_open_to_others_before_its_mode_is_set(base, monkeypatch):
    os.chmod(base, 0o644)
    seen = []
    real = os.fchmod
    monkeypatch.setattr(
        plock.os, "fchmod", lambda fd, m: (seen.append(os.fstat(fd).st_mode & 0o777), real(fd, m))
    )
    lock = PLock(str(base))
    lock.lock()
    lock.unlock()
    assert seen == [0o600]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_failed_commit_leaves_the_original(base, monkeypatch, step):
    lock = PLock(str(base))
    lock.lock().write("new")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plock.os, step, fail)
    with pytest.raises(OSError, match="No space"):
        lock.commit()
    monkeypatch.undo()
    assert base.read_text() == "original"
    assert names(base) == ["base"]
    lock.lock()
    lock.unlock()


def test_backup_that_cannot_be_made_stops_the_commit(base):
    lock = PLock(str(base))
    lock.lock().write("new")
    with pytest.raises(FileNotFoundError):
        lock.commit(str(base.parent / "missing" / "backup"))
    assert base.read_text() == "original"
    assert names(base) == ["base"]


def test_lock_file_that_was_removed_is_not_committed(base):
    lock = PLock(str(base))
    lock.lock().write("new")
    os.unlink(lock.lockname)
    with pytest.raises(OSError, match="removed meanwhile"):
        lock.commit()
    assert base.read_text() == "original"


def test_lock_file_of_somebody_else_is_neither_removed_nor_committed(base):
    lock, other = PLock(str(base)), PLock(str(base))
    lock.lock().write("new")
    os.unlink(lock.lockname)
    other.lock().write("other")
    with pytest.raises(OSError, match="removed meanwhile"):
        lock.commit()
    assert names(base) == ["base", "base.lock"]
    other.commit()
    assert base.read_text() == "other"


def test_wlock_waits_until_the_lock_is_free(base):
    first, second = PLock(str(base)), PLock(str(base))
    first.lock().write("first")
    waiting = threading.Event()

    def release():
        assert waiting.wait(10)
        first.commit()

    helper = threading.Thread(target=release)
    helper.start()
    real = second.lock

    def lock(name=None):
        try:
            return real(name)
        except FileExistsError:
            waiting.set()
            raise

    second.lock = lock
    second.wlock().write("second")
    helper.join(10)
    assert base.read_text() == "first"
    second.commit()
    assert base.read_text() == "second"


def test_wlock_gives_up_in_time(base):
    holder = PLock(str(base))
    holder.lock()
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="still locked"):
        PLock(str(base)).wlock(timeout=0.1)
    assert 0.1 <= time.monotonic() - begin < 5
    holder.unlock()


def test_wlock_with_a_name_of_its_own(base):
    lock = PLock(str(base))
    lock.wlock(str(base) + ".mine", timeout=1)
    assert names(base) == ["base", "base.mine"]
    lock.unlock()


COUNT = """
import sys
from Milter.plock import PLock
for _ in range(50):
    lock = PLock(sys.argv[1])
    fp = lock.wlock(timeout=60)
    fp.write(str(int(open(sys.argv[1]).read()) + 1))
    lock.commit(sys.argv[1] + ".old")
"""


def test_processes_never_lose_an_update(base):
    base.write_text("0")
    command = [sys.executable, "-c", COUNT, str(base)]
    workers = [subprocess.Popen(command) for _ in range(3)]
    for worker in workers:
        assert worker.wait(60) == 0
    assert base.read_text() == "150"
    assert base.with_suffix(".old").read_text() == "149"


def test_reader_sees_the_old_file_or_the_new(base):
    base.write_text("x" * 100_000)
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            seen.add(base.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(50):
            lock = PLock(str(base))
            lock.lock().write(str(number % 10) * 100_000)
            lock.commit()
    finally:
        stop.set()
        reader.join(10)
    assert all(len(text) == 100_000 and len(set(text)) == 1 for text in seen)


def test_full_disk_at_unlock(base, monkeypatch):
    with open("/dev/full", "w") as full:
        lock = PLock(str(base))
        fd = lock.lock().fileno()
        os.dup2(full.fileno(), fd)
    lock.fp.write("x" * 10)
    lock.unlock()
    # What stands for the lock file now is another file, so the name is not touched.
    assert names(base) == ["base", "base.lock"]


def test_folder_that_cannot_be_synced(base, monkeypatch):
    lock = PLock(str(base))
    lock.lock().write("new")
    real = os.open
    monkeypatch.setattr(plock.os, "open", lambda *a: refuse() if a[1] == os.O_RDONLY else real(*a))
    lock.commit()
    assert base.read_text() == "new"


def test_original_that_cannot_be_linked(base):
    lock = PLock(str(base))
    lock.lock()
    base.unlink()
    base.mkdir()
    with pytest.raises(PermissionError):
        lock.commit(str(base) + ".old")
    assert base.is_dir()
