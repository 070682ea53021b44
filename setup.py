"""Build the extension module ``milter``; everything else stands in pyproject.toml.

Environment variables:

LIBMILTER_INCLUDE   directory that holds ``libmilter/mfapi.h``
LIBMILTER_LIB       directory that holds libmilter itself
LIBMILTER_STATIC    1 links the static archive, so that the module needs no libmilter at run time
PKG_CONFIG          the pkg-config program to ask
PYMILTER_WERROR     1 turns the compiler's warnings into errors
PYMILTER_TURNSTILE  0 leaves out the turnstile before the interpreter lock, to see its worth
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

# Hidden: what the source files share is no business of other libraries.
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]

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
COMPILERS = (
    "gcc and libc6-dev (Debian, Ubuntu), gcc (Fedora, RHEL), gcc and musl-dev (Alpine) "
    "or the command line tools (macOS: xcode-select --install)"
)


def wanted(variable: str, default: str = "0") -> bool:
    """Whether the environment switches ``variable`` on."""
    return os.environ.get(variable, default) not in ("", "0")


def has_turnstile() -> bool:
    """Whether callbacks pass a turnstile: not where there is no interpreter lock to queue for."""
    return wanted("PYMILTER_TURNSTILE", "1") and not sysconfig.get_config_var("Py_GIL_DISABLED")


def c_files(pattern: str) -> list[str]:
    """The files below src/ that match, in a definite order."""
    return sorted(path.as_posix() for path in Path("src").rglob(pattern))


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


def check_compiler(command: list[str]) -> None:
    """SetupError where the compiler's program is not there."""
    if shutil.which(command[0]) is None:
        raise SetupError(
            f"the C compiler {command[0]} is not on this machine: install {COMPILERS}, or set CC"
        )


def check_python_headers(paths: list[Path]) -> None:
    """SetupError where none of these directories has Python's headers."""
    if not any((path / "Python.h").is_file() for path in paths):
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(
            f"Python.h of Python {version} is not in {sysconfig.get_path('include')}: install "
            f"python{version}-dev (Debian, Ubuntu), python3-devel (Fedora, RHEL) "
            "or python3-dev (Alpine)"
        )


class BuildExt(build_ext):
    """Looks for libmilter when the extension is compiled, so that an sdist needs none."""

    def build_extension(self, ext: Extension) -> None:
        paths = [*map(Path, self.include_dirs or []), *compiler_paths()]
        check_compiler(self.compiler.compiler_so)
        check_python_headers([Path(sysconfig.get_path("include")), *paths])
        include = find_include(paths)
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
                sources=["miltermodule.c", *c_files("*.c")],
                depends=c_files("*.h"),
                include_dirs=["src"],
                define_macros=[("PYMILTER_TURNSTILE", str(int(has_turnstile())))],
                extra_compile_args=FLAGS,
                extra_link_args=["-pthread"],
            )
        ],
    )
