"""Build the extension module ``milter``; everything else stands in pyproject.toml.

Environment variables:

LIBMILTER_INCLUDE   directory that holds ``libmilter/mfapi.h``
LIBMILTER_LIB       directory that holds libmilter itself
LIBMILTER_STATIC    1 links the static archive, so that the module needs no libmilter at run time
PKG_CONFIG          the pkg-config program to ask
PYMILTER_WERROR     1 turns the compiler's warnings into errors
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

# Hidden: what the source files share is no business of other libraries.
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]

HEADER = Path("libmilter", "mfapi.h")
ARCHIVE = "libmilter.a"

# Where the system's own packages, FreeBSD's ports and hand-built copies, Homebrew (Apple silicon,
# Intel) and MacPorts put libmilter: the first that holds the header wins.
PREFIXES = (
    "/usr",
    "/usr/local",
    "/opt/homebrew/opt/libmilter",
    "/opt/homebrew",
    "/usr/local/opt/libmilter",
    "/opt/local",
)

PACKAGES = (
    "libmilter-dev (Debian, Ubuntu, Alpine), sendmail-milter-devel (Fedora, RHEL) "
    "or libmilter (FreeBSD pkg, macOS brew or port)"
)


def wanted(variable: str) -> bool:
    """Whether the environment switches ``variable`` on."""
    return os.environ.get(variable, "0") not in ("", "0")


def override(variable: str) -> Path | None:
    """The directory that the environment names in ``variable``, None where it names none."""
    value = os.environ.get(variable)
    return Path(value).resolve() if value else None


def pkg_config(variable: str) -> Path | None:
    """The directory that libmilter's pkg-config file names in ``variable``, None without a file."""
    program = shlex.split(os.environ.get("PKG_CONFIG", "pkg-config"))
    for package in ("milter", "libmilter"):
        command = [*program, f"--variable={variable}", package]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        if answer.stdout.strip():
            return Path(answer.stdout.strip())
    return None


def compiler_paths() -> list[Path]:
    """The directories that the compiler's own variables and flags add to its search."""
    paths = [
        entry
        for variable in ("CPATH", "C_INCLUDE_PATH")
        for entry in os.environ.get(variable, "").split(os.pathsep)
    ]
    for variable in ("CPPFLAGS", "CFLAGS"):
        flags = shlex.split(os.environ.get(variable, ""))
        paths += [flag[2:] for flag in flags if flag.startswith("-I")]
    return [Path(entry) for entry in paths if entry]


def find_include(extra: list[Path]) -> Path:
    """The directory to which ``libmilter/mfapi.h`` is relative; SetupError where there is none."""
    chosen = override("LIBMILTER_INCLUDE")
    if chosen:
        # Both .../include and .../include/libmilter are what people have in mind.
        candidates = [chosen, chosen.parent]
        where = f"in LIBMILTER_INCLUDE={chosen}"
    else:
        listed = pkg_config("includedir")
        candidates = [*extra, *([listed, listed.parent] if listed else [])]
        candidates += [Path(prefix, "include") for prefix in PREFIXES]
        where = "on this machine"
    for directory in candidates:
        if (directory / HEADER).is_file():
            return directory
    raise SetupError(f"{HEADER} is not {where}: install {PACKAGES}, or set LIBMILTER_INCLUDE")


def find_lib(include: Path) -> Path | None:
    """The directory of libmilter itself, None where the linker looks there of its own accord."""
    chosen = override("LIBMILTER_LIB")
    if chosen:
        return chosen
    listed = pkg_config("libdir") if not override("LIBMILTER_INCLUDE") else None
    if listed:
        return listed
    beside = include.parent / "lib"
    return beside if include != Path("/usr/include") and beside.is_dir() else None


def find_archive(lib: Path | None, compiler: list[str]) -> Path:
    """The static archive; SetupError where there is none."""
    if lib and (lib / ARCHIVE).is_file():
        return lib / ARCHIVE
    if not override("LIBMILTER_LIB"):
        # Given by the compiler as an absolute path where it finds one, else as the bare name.
        command = [*compiler, f"-print-file-name={ARCHIVE}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        found = Path(answer.stdout.strip())
        if found.is_absolute():
            return found
    raise SetupError(
        f"{ARCHIVE}, which LIBMILTER_STATIC asks for, is not "
        f"{f'in {lib}' if lib else 'on this machine'}: install {PACKAGES}, or set LIBMILTER_LIB"
    )


class BuildExt(build_ext):
    """Looks for libmilter when the extension is compiled, so that an sdist needs none."""

    def build_extension(self, ext: Extension) -> None:
        include = find_include([*map(Path, self.include_dirs or []), *compiler_paths()])
        lib = find_lib(include)
        if include != Path("/usr/include"):
            ext.include_dirs.append(str(include))
        if wanted("LIBMILTER_STATIC"):
            ext.extra_objects.append(str(find_archive(lib, self.compiler.compiler_so[:1])))
        else:
            ext.libraries.append("milter")
            if lib:
                ext.library_dirs.append(str(lib))
            if override("LIBMILTER_LIB"):
                # A library in a place of its own choice must be found again at run time.
                ext.runtime_library_dirs.append(str(lib))
        if wanted("PYMILTER_WERROR"):
            ext.extra_compile_args.append("-Werror")
        super().build_extension(ext)


def licence() -> dict[str, str]:
    """The licence in the words of this setuptools: PEP 639 came with version 77.

    LICENSE.libmilter stands here where libmilter is to go into a wheel.
    """
    modern = int(setuptools.__version__.partition(".")[0]) >= 77
    terms = "GPL-2.0-or-later"
    if Path("LICENSE.libmilter").exists():
        terms += " AND Sendmail-8.23"
    return {"license_expression" if modern else "license": terms}


def description() -> dict[str, str]:
    """README.md for a package index: links to files of the repository are their text alone."""
    text = Path("README.md").read_text(encoding="utf-8")
    return {
        "long_description": re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", text),
        "long_description_content_type": "text/markdown",
    }


if __name__ == "__main__":
    setup(
        **licence(),
        **description(),
        cmdclass={"build_ext": BuildExt},
        ext_modules=[
            Extension(
                "milter",
                sources=["miltermodule.c", *sorted(map(str, Path("src").glob("*.c")))],
                depends=sorted(map(str, Path("src").glob("*.h"))),
                include_dirs=["src"],
                extra_compile_args=FLAGS,
                extra_link_args=["-pthread"],
            )
        ],
    )
