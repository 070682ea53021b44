"""What is said where a library that an extra names cannot be imported."""

from __future__ import annotations


def unusable(
    user: str, library: str, package: str, exc: ImportError, hint: str = ""
) -> ImportError:
    """What to raise in the place of an import's error.

    Args:
        user: what needs the library, as the message begins.
        library: its name in Python's package index.
        package: what imports it.
        exc: why the import failed.
        hint: what the library itself needs, where it is there and does not load; or is built with.

    Returns:
        An error that names the library: how to install it, where it is not there, and else why it
        does not load, as to install it again would not help.
    """
    if isinstance(exc, ModuleNotFoundError) and (exc.name or "").partition(".")[0] == package:
        text = f"{user} needs the Python package {library}: pip install {library}"
        if hint:
            text += f" ({hint})"
    else:
        text = f"{user}: the Python package {library} is installed and does not load: {exc}"
        if hint:
            text += f": {hint}"
    return ImportError(text, name=package)
