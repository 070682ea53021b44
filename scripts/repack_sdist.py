"""Make an sdist the same bytes whenever it is built: repack_sdist.py ARCHIVE EPOCH.

setuptools writes the files in the order and with the owners and times of the directory that they
come from, and gzip the time at which it ran.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from pathlib import Path


def main(path: Path, epoch: int) -> None:
    packed = io.BytesIO()
    with (
        tarfile.open(path) as old,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = epoch
            member.pax_headers = {}
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=epoch))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
