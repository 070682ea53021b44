r"""Lock files that become the next version of the file they protect.

A writer creates ``NAME.lock`` exclusively, fills it, and renames it over ``NAME``: readers see
the old file or the new one and never a half-written one, and a second writer is kept out
meanwhile.  This is the protocol of ``vipw`` and friends.

>>> import pathlib, tempfile
>>> folder = tempfile.TemporaryDirectory()
>>> relays = pathlib.Path(folder.name, "relays")
>>> lock = PLock(relays)
>>> written = lock.lock().write("192.0.2.1\n")
>>> lock.commit()
>>> relays.read_text()
'192.0.2.1\n'
>>> folder.cleanup()
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from typing import TextIO

__all__ = ["PLock"]

_POLL_FIRST = 0.01
_POLL_LONGEST = 0.25


class PLock:
    """Replace a file atomically while a lock file keeps other writers out.

    A lock file whose owner was killed stays until somebody removes it: whether its contents matter
    cannot be known here.

    Args:
        basename: the path of the file to protect; it need not exist yet.

    Attributes:
        basename: that path.
        lockname: the lock file's path.
        fp: the open lock file, or None while not locked.
    """

    def __init__(self, basename: str | os.PathLike[str]) -> None:
        self.basename = os.fspath(basename)
        self.lockname = self.basename + ".lock"
        self.fp: TextIO | None = None

    def lock(
        self,
        lockname: str | os.PathLike[str] | None = None,
        mode: int = 0o660,
        strict_perms: bool = False,
    ) -> TextIO:
        """Create the lock file.

        It takes mode and group of the original, so that ``commit`` does not change who may read it.
        When the group cannot be given (the caller is not one of its members) it keeps the caller's
        group, and the original's rights for the group are withheld from it.

        Args:
            lockname: its path, on the same file system; by default ``basename + ".lock"``.
            mode: where there is no original.
            strict_perms: raise PermissionError where the group cannot be given.

        Returns:
            The lock file, open for writing text. That is UTF-8; other bytes pass through as
            surrogate escapes.

        Raises:
            FileExistsError: somebody holds the lock, or this object does already.
            OSError: the file cannot be made.
        """
        if self.fp is not None:
            raise FileExistsError(errno.EEXIST, "already locked by this PLock", self.lockname)
        name = self.basename + ".lock" if lockname is None else os.fspath(lockname)
        self.lockname = name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600)
        try:
            self._take_permissions(fd, mode, strict_perms)
            self.fp = os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape")
        except BaseException:
            os.close(fd)
            os.unlink(name)
            raise
        return self.fp

    def wlock(
        self, lockname: str | os.PathLike[str] | None = None, timeout: float | None = None
    ) -> TextIO:
        """Wait until the lock is free, and take it.

        Args:
            lockname: as for ``lock``.
            timeout: seconds to wait; None is for as long as somebody holds the lock (or left it
                behind).

        Returns:
            The lock file, as ``lock`` does.

        Raises:
            TimeoutError: the time is up.
            FileExistsError: this object itself holds the lock.
            OSError: the file cannot be made.
        """
        if self.fp is not None:
            raise FileExistsError(errno.EEXIST, "already locked by this PLock", self.lockname)
        end = None if timeout is None else time.monotonic() + timeout
        pause = _POLL_FIRST
        while True:
            try:
                return self.lock(lockname)
            except FileExistsError:
                left = pause if end is None else end - time.monotonic()
            if left <= 0:
                text = f"still locked by another writer after {timeout} s"
                raise TimeoutError(errno.ETIMEDOUT, text, self.lockname)
            time.sleep(min(pause, left))
            pause = min(pause * 2, _POLL_LONGEST)

    def commit(self, backname: str | os.PathLike[str] | None = None) -> None:
        """Put what was written in the original's place and drop the lock.

        At no moment is the original missing, and the new contents are on the disk before they take
        the name.

        Args:
            backname: a name to which the original, if there is one, is linked first, in place of
                any older backup.

        Raises:
            OSError: nothing is locked, the lock file was removed by somebody else meanwhile, or a
                step failed; the original is then untouched and the lock dropped.
        """
        if self.fp is None:
            raise OSError(errno.ENOLCK, "File not locked", self.basename)
        try:
            self.fp.flush()
            os.fsync(self.fp.fileno())
            if not self._is_ours():
                raise OSError(errno.ESTALE, "the lock file was removed meanwhile", self.lockname)
            if backname is not None:
                _link_over(self.basename, os.fspath(backname))
            os.rename(self.lockname, self.basename)
        except BaseException:
            self.unlock()
            raise
        fp, self.fp = self.fp, None
        fp.close()
        _sync_directory(self.basename)

    def unlock(self) -> None:
        """Drop the lock and what was written; does nothing where nothing is locked."""
        if self.fp is None:
            return
        fp, self.fp = self.fp, None
        try:
            if self._is_ours(fp):
                os.unlink(self.lockname)
        finally:
            # What is still buffered is dropped, so a full disk is no reason to fail.
            with contextlib.suppress(OSError):
                fp.close()

    def _is_ours(self, fp: TextIO | None = None) -> bool:
        """Whether the lock file's name still leads to the file that this object made."""
        held = fp or self.fp
        assert held is not None
        try:
            return os.path.samestat(os.fstat(held.fileno()), os.lstat(self.lockname))
        except FileNotFoundError:
            return False

    def _take_permissions(self, fd: int, mode: int, strict: bool) -> None:
        try:
            original = os.stat(self.basename)
        except FileNotFoundError:
            os.fchmod(fd, mode)
            return
        wanted = stat.S_IMODE(original.st_mode)
        try:
            if os.fstat(fd).st_gid != original.st_gid:
                os.fchown(fd, -1, original.st_gid)
        except PermissionError:
            if strict:
                raise
            # Another group must not inherit what the original allowed its own group.
            wanted &= ~stat.S_IRWXG
        os.fchmod(fd, wanted)


def _link_over(source: str, target: str) -> None:
    """Hard-link *source* to *target*, replacing what has that name; no source, no link."""
    temporary = f"{target}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        os.link(source, temporary)
    except FileNotFoundError:
        if os.path.lexists(source):
            raise
        return
    try:
        os.rename(temporary, target)
    finally:
        # rename() leaves both names in place when they are one file already.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync_directory(path: str) -> None:
    """Make a rename durable, on file systems that let a directory be synced."""
    with contextlib.suppress(OSError):
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
