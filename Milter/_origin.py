"""Whether this package and the extension module ``milter`` belong together.

They are installed together. Where a source tree, or a second installation, is before the right one
on ``sys.path``, one of the two may come from there.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing takes a megabyte in every filter; type checkers know the name
if TYPE_CHECKING:
    from types import ModuleType

_HERE = os.path.dirname(os.path.realpath(__file__))
_ROOT = os.path.dirname(_HERE)


def check(extension: ModuleType) -> None:
    """Refuse an extension module of another version.

    Raises:
        ImportError: it is one; the message names both versions and both files, and what to do.
    """
    file = os.path.realpath(extension.__file__ or "")
    # What lies in one directory was installed together: there are no versions to be read.
    if os.path.dirname(file) == _ROOT:
        return
    ours, theirs = find_version(), _version_beside(file)
    if ours == theirs:
        return
    theirs = theirs or "of an unknown version"
    cure = f"remove one of the two, or put {_ROOT} first on sys.path"
    if _version_of_tree():
        cure = (
            f"{_SOURCE_TREE} run Python in another directory for what is installed, or install "
            f"this one: {_install()}"
        )
    raise ImportError(
        f"Milter {ours} ({_HERE}) and the extension module milter {theirs} ({file}) "
        f"do not belong together: {cure}",
        name="Milter",
    )


def not_found() -> ImportError:
    """What to raise where there is no extension module; the message says what to do."""
    python = f"Python {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    text = f"Milter {find_version()} ({_HERE}) needs the extension module milter, "
    others = [name for name in sorted(os.listdir(_ROOT)) if _is_extension(name)]
    if others:
        text += f"and {python} cannot load the one beside it, {others[0]}: "
    else:
        text += f"which {python} does not have: "
    if _version_of_tree():
        text += f"{_SOURCE_TREE} install it: {_install()}"
    else:
        text += "install pymilter with this Python"
    return ImportError(text, name="milter")


def find_version() -> str:
    """The version: from the project's file beside a source tree, else from the installation."""
    from importlib import metadata

    return _version_of_tree() or metadata.version("pymilter")


_SOURCE_TREE = "this is the source tree;"


def _version_of_tree() -> str | None:
    """The version in the project's file beside this package; None where it is installed."""
    import re

    try:
        with open(os.path.join(_ROOT, "pyproject.toml"), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return None
    found = re.search(r'^name = "pymilter"\nversion = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else None


def _install() -> str:
    """The command that installs the source tree for this Python, or beside it."""
    import shlex
    import sysconfig

    python, tree = shlex.quote(sys.executable), shlex.quote(_ROOT)
    prefix = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    # PEP 668: pip refuses to install into the Python of a distribution, but not beside it.
    managed = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if os.path.exists(managed) and not os.path.exists(os.path.join(prefix, "pyvenv.cfg")):
        place = "/opt/filters"
        return f"{python} -m venv {place} && {place}/bin/pip install {tree}"
    return f"{python} -m pip install {tree}"


def _is_extension(name: str) -> bool:
    return name.startswith("milter.") and name.endswith(".so")


def _version_beside(file: str) -> str | None:
    """The version of the pymilter that was installed into the directory of this file."""
    from importlib import metadata

    for found in metadata.distributions(name="pymilter", path=[os.path.dirname(file)]):
        return found.version
    return None


try:
    import milter
except ModuleNotFoundError as exc:
    if exc.name != "milter":
        raise
    raise not_found() from None
check(milter)
