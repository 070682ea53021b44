"""POSIX access control lists of Linux, as the kernel stores them (xattr(7), acl(5)).

FreeBSD, macOS and file systems with lists of another kind (NFSv4) are not looked into.
"""

from __future__ import annotations

import errno
import os
import struct

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"

USER, GROUP_OBJ, GROUP = 0x02, 0x04, 0x08
_MASK = 0x10
_WRITE = 2
_VERSION = 2
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
#: What the kernel says where there is no list, or where there can be none.
_NONE = {errno.ENODATA if hasattr(errno, "ENODATA") else errno.ENOENT, errno.ENOTSUP, errno.ENOSYS}


def writers(path: str, name: str) -> list[tuple[int, int]] | None:
    """Who of the group class may write, the mask taken into account.

    Args:
        path: of a file or directory.
        name: ``ACCESS``, or ``DEFAULT`` for the list that what is made in a directory gets.

    Returns:
        For each user and group its kind (``USER``, ``GROUP``, or ``GROUP_OBJ`` for the group that
        owns it, without a number) and number; None where there is no list and the mode says it all.

    Raises:
        OSError: it cannot be read, or is in no form that is known.
    """
    if not hasattr(os, "getxattr"):
        return None
    try:
        data = os.getxattr(path, name)
    except OSError as exc:
        if exc.errno in _NONE:
            return None
        raise
    if len(data) % _ENTRY.size != _HEADER.size or _HEADER.unpack_from(data)[0] != _VERSION:
        raise OSError(errno.EINVAL, "its access control list is of an unknown form", path)
    entries = list(_ENTRY.iter_unpack(data[_HEADER.size :]))
    mask = next((rights for kind, rights, _ in entries if kind == _MASK), 0o7)
    return [
        (kind, number if kind != GROUP_OBJ else -1)
        for kind, rights, number in entries
        if kind in (USER, GROUP_OBJ, GROUP) and rights & mask & _WRITE
    ]


def remove(path: str) -> None:
    """Remove the list of a file, so that its mode says it all.

    Raises:
        OSError: there is one, and it cannot be removed.
    """
    if not hasattr(os, "removexattr"):
        return
    try:
        os.removexattr(path, ACCESS)
    except OSError as exc:
        if exc.errno not in _NONE:
            raise
