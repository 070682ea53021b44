"""The house: arrows among the product's modules run one way, and no file or function is too long.

Read from the sources: an import counts where it would run, within functions too.  What stands under
``if TYPE_CHECKING:`` never does.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAX_LINES = 1200
MAX_FUNCTION = 60

#: Modules that read a façade when they are used, as applications assign to what it holds.  Each
#: imports it as a whole (``import Milter``): a name taken from it would be the one of that moment.
LATE_BINDINGS = {
    ("Milter._decorators", "Milter"): "enable_protocols, which applications may replace",
    ("Milter._mime.limits", "mime"): "MAX_* and lists of names, which applications set",
    ("Milter._runner", "Milter"): "factory and the callbacks, which applications replace",
}

#: Files that are longer still: the lines that they may have, and why.
LONG_FILES: dict[str, tuple[int, str]] = {}

#: The same for functions.
LONG_FUNCTIONS: dict[str, tuple[int, str]] = {}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for path in [ROOT / "mime.py", *sorted((ROOT / "Milter").rglob("*.py"))]
}
C_FILES = [*sorted(ROOT.glob("*.c")), *sorted((ROOT / "src").rglob("*.[ch]"))]


# --- imports -------------------------------------------------------------------------------------


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if is_type_checking(node):
        assert isinstance(node, ast.If)
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from nodes_that_run(child)


def base_of(name: str, is_package: bool, node: ast.ImportFrom) -> str:
    """What ``from … import`` starts from."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def known_part(name: str, modules: set[str]) -> str | None:
    """The module of the product that importing *name* reaches, None for others."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def imports(
    name: str, tree: ast.AST, is_package: bool, modules: set[str]
) -> Iterator[tuple[str, bool]]:
    """Each module of the product that a module imports, and whether as a whole."""
    for node in nodes_that_run(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = known_part(alias.name, modules)
                if target is not None:
                    yield target, True
        elif isinstance(node, ast.ImportFrom):
            base = base_of(name, is_package, node)
            for alias in node.names:
                target = known_part(f"{base}.{alias.name}", modules)
                if target is not None:
                    yield target, False


def arrows(sources: dict[str, tuple[str, bool]]) -> dict[str, set[tuple[str, bool]]]:
    modules = set(sources)
    return {
        name: set(imports(name, ast.parse(text), is_package, modules))
        for name, (text, is_package) in sources.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, none where there is no circle."""
    done: set[str] = set()
    way: list[str] = []

    def visit(name: str) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        way.append(name)
        for target in sorted(graph[name]):
            found = visit(target)
            if found:
                return found
        way.pop()
        done.add(name)
        return []

    for name in sorted(graph):
        found = visit(name)
        if found:
            return found
    return []


def without_late_bindings(found: dict[str, set[tuple[str, bool]]]) -> dict[str, set[str]]:
    return {
        name: {
            target
            for target, as_a_whole in targets
            if not (as_a_whole and (name, target) in LATE_BINDINGS)
        }
        for name, targets in found.items()
    }


@functools.lru_cache
def product() -> dict[str, set[tuple[str, bool]]]:
    return arrows(
        {
            name: (path.read_text("utf-8"), path.name == "__init__.py")
            for name, path in MODULES.items()
        }
    )


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(without_late_bindings(product())) == []


@pytest.mark.parametrize(("name", "facade"), LATE_BINDINGS)
def test_late_bindings_are_there_and_late(name: str, facade: str) -> None:
    found = product()
    assert (facade, True) in found[name]
    assert (facade, False) not in found[name]
    # It would be a circle if it were not late; else it needs no mention.
    graph = {each: {target for target, _ in targets} for each, targets in found.items()}
    assert circle({**without_late_bindings(found), name: graph[name]}) != []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "import b", "b": ""}, []),
        ({"a": "import b", "b": "import a"}, ["a", "b", "a"]),
        ({"a": "import b", "b": "def f():\n    from a import x"}, ["a", "b", "a"]),
        ({"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}, []),
        (
            {"a": "import b", "b": "if TYPE_CHECKING:\n    pass\nelse:\n    import a"},
            ["a", "b", "a"],
        ),
        ({"p": "from .a import x", "p.a": "from . import b", "p.b": ""}, []),
        ({"p": "from .a import x", "p.a": "from . import x"}, ["p", "p.a", "p"]),
        ({"p": "", "p.a": "from .b import x", "p.b": "from ..p.a import y"}, ["p.a", "p.b", "p.a"]),
        ({"p": "", "p.a": "import p.b.c", "p.b": "from p import a"}, ["p.a", "p.b", "p.a"]),
    ],
)
def test_circles_are_found(sources: dict[str, str], found: list[str]) -> None:
    texts = {name: (text, name == "p") for name, text in sources.items()}
    assert circle(without_late_bindings(arrows(texts))) == found


def test_mime_s_modules_are_listed_in_the_order_of_their_imports() -> None:
    text = ast.get_docstring(ast.parse(MODULES["Milter._mime"].read_text("utf-8"))) or ""
    listed = re.findall(r"^`(\w+)`", text, re.MULTILINE)
    prefix = "Milter._mime."
    found = {name: targets for name, targets in product().items() if name.startswith(prefix)}
    assert sorted(listed) == sorted(name[len(prefix) :] for name in found)
    for place, name in enumerate(listed):
        above = {prefix + each for each in listed[:place]}
        assert {target for target, _ in found[prefix + name] if target in found} <= above


#: What understands the protocol, and may neither wait nor talk to anybody.
WITHOUT_IO = ["vocabulary", "errors", "wire", "commands", "macros", "messages", "edits", "session"]
WITHOUT_IO += ["transaction"]


@pytest.mark.parametrize("name", WITHOUT_IO)
def test_what_understands_the_protocol_does_no_io(name: str) -> None:
    tree = ast.parse(MODULES[f"Milter.mta.{name}"].read_text("utf-8"))
    taken: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            taken.add("." * node.level + (node.module or ""))
    assert not taken & {"socket", "select", "selectors", "time", "os", "asyncio", "threading"}
    assert not taken & {".client", ".address"}
    calls = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not calls & {"open", "print", "input"}


# --- sizes ---------------------------------------------------------------------------------------


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Each function, and how many lines it takes with its signature and without its docstring."""
    text = path.read_text("utf-8")
    name = str(path.relative_to(ROOT))
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{name}:{node.name}", extent(node) - docstring_lines(node)
    else:
        for function, lines in c_functions(text):
            yield f"{name}:{function}", lines


def extent(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return extent(node.body[0]) if ast.get_docstring(node) is not None else 0


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """PEP 7, which clang-format keeps: name and braces stand at the start of a line."""
    name, start = "", 0
    for number, line in enumerate(text.splitlines()):
        found = re.match(r"(\w+)\(", line)
        if found:
            name, start = found[1], number
        elif line == "}" and name:
            yield name, number - start + 1
            name = ""
        elif line.endswith(";") and line[:1] not in (" ", "\t", "}", "/"):
            name = ""


@pytest.mark.parametrize("path", [*MODULES.values(), *C_FILES], ids=lambda path: path.name)
def test_no_file_is_too_long(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert lines_of(path) <= LONG_FILES.get(name, (MAX_LINES, ""))[0]


@pytest.mark.parametrize("path", [*MODULES.values(), *C_FILES], ids=lambda path: path.name)
def test_no_function_is_too_long(path: Path) -> None:
    too_long = {
        name: lines
        for name, lines in functions_of(path)
        if lines > LONG_FUNCTIONS.get(name, (MAX_FUNCTION, ""))[0]
    }
    assert too_long == {}


def test_the_functions_are_found() -> None:
    assert (
        dict(functions_of(Path(__file__)))["tests/packaging/test_architecture.py:module_name"] == 3
    )
    source = (ROOT / "src" / "arguments.c").read_text("utf-8")
    assert len(list(c_functions(source))) == len(re.findall(r"^\{$", source, re.MULTILINE))
    counted = [len(list(functions_of(path))) for path in C_FILES if path.suffix == ".c"]
    assert sum(counted) > 200
