"""The package's namespace: what applications find in ``Milter``."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import subprocess
import sys
import types
from importlib import metadata

import milter
import pytest

import Milter
from Milter import _origin

OWN_NAMES = [name for name in Milter.__all__ if not hasattr(milter, name)]


def test_star_import_gives_every_public_name():
    namespace = {}
    exec("from Milter import *", namespace)
    public = {name for name in vars(milter) if not name.startswith("_")}
    assert public <= set(namespace)
    assert namespace["Milter"] is Milter.Milter
    assert namespace["milter"] is milter
    assert {"Base", "runmilter", "uniqueID", "noreply", "factory"} <= set(namespace)


def test_star_import_gives_nothing_else():
    namespace = {}
    exec("from Milter import *", namespace)
    namespace.pop("__builtins__")
    assert sorted(namespace) == sorted(Milter.__all__)
    modules = [name for name, value in namespace.items() if isinstance(value, types.ModuleType)]
    assert modules == ["milter"]
    assert not {"os", "re", "sys", "Any", "Callable", "annotations"} & set(namespace)


def test_all_lists_each_name_once():
    assert len(Milter.__all__) == len(set(Milter.__all__))
    assert all(isinstance(name, str) for name in Milter.__all__)


def test_the_extension_is_part_of_the_namespace():
    assert Milter.milter is milter
    assert Milter.error is milter.error is Milter.milter.error
    assert Milter.CONTINUE == milter.CONTINUE
    assert Milter.stop is milter.stop


@pytest.mark.parametrize("name", OWN_NAMES)
def test_public_objects_say_where_they_are_found(name):
    value = getattr(Milter, name)
    if callable(value):
        assert value.__module__ == "Milter"
    else:
        assert name in {"MACRO_CALLBACKS", "OPTIONAL_CALLBACKS", "R", "milter"}


def documented():
    """Every public class, function and method of the package's modules, with its name."""
    owners = [(name, getattr(Milter, name)) for name in OWN_NAMES]
    for module_name in ("testctx", "test"):
        module = importlib.import_module(f"Milter.{module_name}")
        owners.append((module_name, module))
        owners += [
            (name, value)
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
        ]
    for name, value in owners:
        if not callable(value) and not inspect.ismodule(value):
            continue
        yield name, value
        if inspect.isclass(value):
            for member, static in vars(value).items():
                if inspect.isroutine(static) and (member == "__init__" or member[0] != "_"):
                    yield f"{name}.{member}", getattr(value, member)


@pytest.mark.parametrize(("name", "value"), list(documented()))
def test_everything_public_is_documented(name, value):
    doc = value.__doc__
    assert doc, name
    assert doc.strip().splitlines()[0].rstrip().endswith((".", ":")), name
    if inspect.isfunction(value):
        text = inspect.getdoc(value)
        for parameter in inspect.signature(value).parameters:
            if "Args:" in text:
                assert parameter in ("self", "klass") or f"{parameter}:" in text, name


def test_help_reads_well():
    text = pydoc.plain(pydoc.render_doc(Milter))
    for line in (
        "Mail filters (milters) for Postfix and sendmail, in Python.",
        "class Base(milter._Decoder)",
        "class DisabledAction(builtins.RuntimeError)",
        "runmilter(",
        "VERSION",
    ):
        assert line in text
    assert "Milter._" not in text.replace("Milter._seq", "")


def test_the_last_unique_id_is_read_late():
    first = Milter.uniqueID()
    assert Milter._seq == first
    assert Milter.uniqueID() == first + 1
    assert Milter._seq == first + 1
    with Milter._seq_lock:
        assert Milter._seq_lock.locked()


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'Milter' has no attribute 'nonsense'"):
        Milter.nonsense  # noqa: B018


def test_the_factory_is_the_logging_class():
    assert Milter.factory is Milter.Milter


def test_decode_mask_names_flags_in_the_order_given():
    names = ["P_NOHELO", "P_NOCONNECT", "P_NOMAIL"]
    assert Milter.decode_mask(3, names) == ["P_NOHELO", "P_NOCONNECT"]
    assert Milter.decode_mask(0, names) == []
    assert Milter.decode_mask(0x402, iter(names)) == ["P_NOHELO", "0x400"]
    assert Milter.decode_mask(0x18, []) == ["0x18"]


def test_decode_mask_lists_all_names_of_one_flag():
    assert Milter.decode_mask(2, ("MODBODY", "CHGBODY")) == ["MODBODY", "CHGBODY"]
    with pytest.raises(AttributeError):
        Milter.decode_mask(1, ["NO_SUCH_FLAG"])


def test_the_tables_of_callbacks():
    assert Milter.MACRO_CALLBACKS == {
        "connect": milter.M_CONNECT,
        "hello": milter.M_HELO,
        "envfrom": milter.M_ENVFROM,
        "envrcpt": milter.M_ENVRCPT,
        "data": milter.M_DATA,
        "eom": milter.M_EOM,
        "eoh": milter.M_EOH,
    }
    assert Milter.OPTIONAL_CALLBACKS["hello"] == (milter.P_NR_HELO, milter.P_NOHELO)
    assert set(Milter.OPTIONAL_CALLBACKS) == (set(Milter.MACRO_CALLBACKS) - {"eom"}) | {
        "header",
        "body",
        "unknown",
    }


# The version.


def test_the_version_is_that_of_the_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(_origin, "_ROOT", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: f"version of {name}")
    assert _origin.find_version() == "version of pymilter"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "7"\n')
    assert _origin.find_version() == "version of pymilter"


def test_the_version_of_a_source_tree_is_that_of_its_project_file(monkeypatch, tmp_path):
    monkeypatch.setattr(_origin, "_ROOT", str(tmp_path))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "pymilter"\nversion = "9.8"\n')
    assert _origin.find_version() == "9.8"


def test_the_version_is_found_once():
    found = Milter.__version__
    assert found[0].isdigit()
    assert vars(Milter)["__version__"] == found


def test_importing_has_no_side_effects(tmp_path):
    """No output, no files, no threads, and none of the modules that only some filters need."""
    program = (
        "import sys, threading, Milter, Milter.test, Milter.testctx\n"
        "assert threading.active_count() == 1\n"
        "heavy = {'dns', 'mime', 'socketserver', 'email', 'sqlite3', 'importlib.metadata'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [
        ("Milter", "os", "os"),
        ("Milter", "re", "re"),
        ("Milter", "sys", "sys"),
        ("Milter", "thread", "_thread"),
        ("Milter", "wraps", "functools:wraps"),
        ("Milter.test", "BytesIO", "io:BytesIO"),
        ("Milter.test", "Milter", "Milter"),
        ("Milter.test", "mime", "mime"),
        ("Milter.testctx", "AF_INET", "socket:AF_INET"),
        ("Milter.testctx", "AF_INET6", "socket:AF_INET6"),
        ("Milter.testctx", "BytesIO", "io:BytesIO"),
        ("Milter.testctx", "Milter", "Milter"),
        ("Milter.testctx", "mime", "mime"),
        ("Milter.testctx", "time", "time"),
        ("Milter.testctx", "utils", "Milter.utils"),
    ],
)
def test_what_the_modules_of_pymilter_had_imported_is_found_there(module, name, place):
    source, _, attribute = place.partition(":")
    expected = importlib.import_module(source)
    expected = getattr(expected, attribute) if attribute else expected
    assert getattr(importlib.import_module(module), name) is expected


@pytest.mark.parametrize("module", ["Milter", "Milter.test", "Milter.testctx"])
def test_other_names_are_not_there(module):
    with pytest.raises(AttributeError, match=f"^module '{module}' has no attribute 'thraed'$"):
        importlib.import_module(module).thraed  # noqa: B018


def test_what_is_read_late_is_listed():
    assert {"_seq", "__version__", "Base", "ACCEPT", "os"} <= set(dir(Milter))
    assert type(Milter._seq) is int
    assert Milter.uniqueID() == Milter._seq
