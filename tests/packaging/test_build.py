"""What setup.py finds and says, and what the packages hold that it builds."""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

import Milter

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300.0

# What a checkout or an unpacked sdist may hold that belongs to no package.
LEFT_OVERS = shutil.ignore_patterns(
    ".git", ".venv", ".venvs", "build", "dist", "_build", "*.egg-info", "PKG-INFO", "setup.cfg",
    ".*_cache", ".hypothesis", ".coverage*", "htmlcov", "__pycache__", "*.so", "*.o", ".gitignore",
)  # fmt: skip


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, on a machine where nothing is to be found."""
    for name in ("CPATH", "C_INCLUDE_PATH", "CPPFLAGS", "CFLAGS", "LIBMILTER_STATIC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LIBMILTER_INCLUDE", "LIBMILTER_LIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PKG_CONFIG", "false")
    spec = importlib.util.spec_from_file_location("pymilter_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PREFIXES", ())
    return module


@pytest.fixture
def make_prefix(tmp_path: Path) -> Callable[[str], Path]:
    """Make a directory with libmilter's header in its include and an archive in its lib."""

    def make(name: str) -> Path:
        prefix = tmp_path / name
        (prefix / "include" / "libmilter").mkdir(parents=True)
        (prefix / "include" / "libmilter" / "mfapi.h").touch()
        (prefix / "lib").mkdir()
        (prefix / "lib" / "libmilter.a").touch()
        return prefix

    return make


@pytest.fixture
def pkg_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Put a pkg-config in place that knows one package."""

    def install(package: str, prefix: Path) -> None:
        program = tmp_path / "pkg-config"
        program.write_text(
            "#!/bin/sh\n"
            f'[ "$2" = {package} ] || exit 1\n'
            "case $1 in\n"
            f'--variable=includedir) echo "{prefix}/include/libmilter";;\n'
            f'--variable=libdir) echo "{prefix}/lib";;\n'
            "esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PKG_CONFIG", str(program))

    return install


# --- looking for libmilter -----------------------------------------------------------------------


def test_a_missing_header_names_the_package_for_each_system(setup_py: Any) -> None:
    with pytest.raises(setup_py.SetupError) as caught:
        setup_py.find_include([])
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("libmilter/mfapi.h is not on this machine: install ")
    for words in (
        "libmilter-dev (Debian, Ubuntu, Alpine)",
        "sendmail-milter-devel (Fedora, RHEL)",
        "libmilter (FreeBSD pkg, macOS brew",
    ):
        assert words in text


def test_missing_python_headers_name_the_package_for_each_system(
    setup_py: Any, tmp_path: Path
) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(setup_py.SetupError) as caught:
        setup_py.check_python_headers([tmp_path])
    assert str(caught.value) == (
        f"Python.h of Python {version} is not in {sysconfig.get_path('include')}: install "
        f"python{version}-dev (Debian, Ubuntu), python3-devel (Fedora, RHEL) or "
        "python3-dev (Alpine)"
    )
    (tmp_path / "Python.h").touch()
    setup_py.check_python_headers([Path("/none"), tmp_path])


def test_the_usual_places_are_taken_in_order(
    setup_py: Any, make_prefix: Callable[[str], Path], tmp_path: Path
) -> None:
    setup_py.PREFIXES = (str(tmp_path / "none"), str(make_prefix("a")), str(make_prefix("b")))
    include = setup_py.find_include([])
    assert include == tmp_path / "a" / "include"
    assert setup_py.find_lib(include) == tmp_path / "a" / "lib"


@pytest.mark.parametrize("package", ["milter", "libmilter"])
def test_pkg_config_comes_before_the_usual_places(
    setup_py: Any,
    make_prefix: Callable[[str], Path],
    pkg_config: Callable[[str, Path], None],
    package: str,
) -> None:
    setup_py.PREFIXES = (str(make_prefix("usual")),)
    listed = make_prefix("listed")
    pkg_config(package, listed)
    include = setup_py.find_include([])
    assert include == listed / "include"
    assert setup_py.find_lib(include) == listed / "lib"


def test_a_missing_pkg_config_does_no_harm(
    setup_py: Any, make_prefix: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKG_CONFIG", "/no/such/pkg-config")
    prefix = make_prefix("usual")
    setup_py.PREFIXES = (str(prefix),)
    assert setup_py.find_include([]) == prefix / "include"


@pytest.mark.parametrize("below", ["", "libmilter"])
def test_the_environment_overrides_everything(
    setup_py: Any,
    make_prefix: Callable[[str], Path],
    pkg_config: Callable[[str, Path], None],
    monkeypatch: pytest.MonkeyPatch,
    below: str,
) -> None:
    pkg_config("milter", make_prefix("listed"))
    chosen = make_prefix("chosen")
    monkeypatch.setenv("LIBMILTER_INCLUDE", str(chosen / "include" / below))
    include = setup_py.find_include([])
    assert include == chosen / "include"
    # The library that goes with the chosen header, unless it is chosen as well.
    assert setup_py.find_lib(include) == chosen / "lib"
    monkeypatch.setenv("LIBMILTER_LIB", "/elsewhere")
    assert setup_py.find_lib(include) == Path("/elsewhere")


@pytest.mark.parametrize(
    ("variable", "form"), [("CPATH", "{}"), ("C_INCLUDE_PATH", ":{}:"), ("CFLAGS", "-O1 -I{}")]
)
def test_what_the_compiler_is_told_counts(
    setup_py: Any,
    make_prefix: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    form: str,
) -> None:
    include = make_prefix("told") / "include"
    monkeypatch.setenv(variable, form.format(include))
    assert setup_py.find_include(setup_py.compiler_paths()) == include


def test_the_archive_is_found_or_asked_for(
    setup_py: Any, make_prefix: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lib = make_prefix("a") / "lib"
    assert setup_py.find_archive(lib, ["cc"]) == lib / "libmilter.a"
    (lib / "libmilter.a").unlink()
    monkeypatch.setenv("LIBMILTER_LIB", str(lib))
    with pytest.raises(setup_py.SetupError, match=r"libmilter\.a, .* install libmilter-dev"):
        setup_py.find_archive(lib, ["cc"])


# --- building ------------------------------------------------------------------------------------


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in ``tree`` with these variables added to the environment."""
    # setuptools has warnings of its own, which are not what is tested.
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "DIST_EXTRA_CONFIG")
    }
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**inherited, "CFLAGS": "-O0", **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a clone would be."""
    copy = tmp_path_factory.mktemp("sources") / "pymilter"
    shutil.copytree(ROOT, copy, ignore=LEFT_OVERS)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tarfile.TarFile]:
    """The source distribution, made where there is no libmilter."""
    out = tmp_path_factory.mktemp("sdist")
    done = run_setup(tree, "-q", "sdist", "-d", str(out), LIBMILTER_INCLUDE=str(out))
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    with tarfile.open(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, linked to the shared libmilter."""
    out = tmp_path_factory.mktemp("wheel")
    done = run_setup(tree, "-q", "bdist_wheel", "-d", str(out), "-b", str(out / "build"))
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile) -> Message:
    """The core metadata of the wheel."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_a_missing_header_ends_the_build_with_one_line(tree: Path, tmp_path: Path) -> None:
    done = run_setup(
        tree, "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path),
        LIBMILTER_INCLUDE=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: libmilter/mfapi.h is not in LIBMILTER_INCLUDE={tmp_path}")
    assert "libmilter-dev" in errors[0]


def test_a_missing_compiler_ends_the_build_with_one_line(tree: Path, tmp_path: Path) -> None:
    done = run_setup(
        tree, "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path), CC="no-such-cc"
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert len(errors) == 1, done.stderr
    assert errors[0] == (
        "error: the C compiler no-such-cc is not on this machine: install gcc and libc6-dev "
        "(Debian, Ubuntu), gcc (Fedora, RHEL), gcc and musl-dev (Alpine) or the command line tools "
        "(macOS: xcode-select --install), or set CC"
    )


def test_the_static_archive_leaves_no_need_of_the_library(tree: Path, tmp_path: Path) -> None:
    done = run_setup(
        tree, "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path / "objects"),
        LIBMILTER_STATIC="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (module,) = tmp_path.glob("milter*.so")
    assert b"libmilter.so" not in module.read_bytes()
    code = "import milter; print(milter.__file__, milter.getversion())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert done.stdout.startswith(str(module))


def test_the_wheel_holds_the_package_and_nothing_else(tree: Path, wheel: zipfile.ZipFile) -> None:
    packages = [tree / name for name in ("Milter", "milter-stubs", "mime-stubs")]
    wanted = {
        str(path.relative_to(tree))
        for package in packages
        for path in package.rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    wanted |= {path.name for path in tree.glob("*.py") if path.name != "setup.py"}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    (module,) = (name for name in names if name.endswith(".so"))
    assert module.startswith("milter.")
    assert b"libmilter.so" in wheel.read(module)
    assert names - {module} == wanted
    assert "Milter/py.typed" in names


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    headers = metadata(wheel)
    assert headers["Name"] == "pymilter"
    assert headers["Version"] == Milter.__version__
    assert "GPL-2.0-or-later" in (headers["License-Expression"], headers["License"])
    assert headers["Requires-Python"] == ">=3.9"
    extras = {"completion", "dns", "metrics", "policy", "postgresql", "redis", "test", "toml"}
    assert set(headers.get_all("Provides-Extra", [])) == extras
    # The core needs nothing but libmilter.
    assert all("extra ==" in need for need in headers.get_all("Requires-Dist", []))
    (licence,) = (name for name in wheel.namelist() if name.endswith("COPYING"))
    assert wheel.read(licence) == (ROOT / "COPYING").read_bytes()


def test_the_sdist_leaves_nothing_out(tree: Path, sdist: tarfile.TarFile) -> None:
    names = {name.partition("/")[2] for name in sdist.getnames() if sdist.getmember(name).isfile()}
    built = ("build/", "dist/", "pymilter.egg-info/")
    wanted = {
        str(path.relative_to(tree))
        for path in tree.rglob("*")
        if path.is_file() and not str(path.relative_to(tree)).startswith(built)
    }
    assert wanted - names == set()
    made = {name for name in names - wanted if not name.startswith("pymilter.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}
    assert {"COPYING", "miltermodule.c", "tests/packaging/test_build.py", ".ci/run"} <= names


def test_the_sdist_keeps_scripts_executable(sdist: tarfile.TarFile) -> None:
    (name,) = (name for name in sdist.getnames() if name.endswith("/scripts/test"))
    assert sdist.getmember(name).mode & 0o111
