"""The names that applications rely on, and how they may be called.

``surface.json`` holds them by module: ``values`` with the name of their type (``object`` for
any), ``constants`` with their value, ``exceptions`` with their bases, ``functions`` and
the members of ``classes`` with a Python argument list, or ``value`` for what is no method.

An argument list says how callers call: with each number of positional arguments that it
allows, and each by its name, except those before a ``/``. Defaults must be the same. The real
signature may take more.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import itertools
import json
from pathlib import Path

import pytest

SURFACE = json.loads(Path(__file__).with_name("surface.json").read_text())


def entries(kind):
    """The entries of one kind in all modules, as test parameters."""
    for module, kinds in SURFACE.items():
        for name, want in kinds.get(kind, {}).items():
            yield pytest.param(module, name, want, id=f"{module}.{name}")


def members():
    """The members of all classes, as test parameters."""
    for module, kinds in SURFACE.items():
        for owner, names in kinds.get("classes", {}).items():
            for name, want in names.items():
                yield pytest.param(module, owner, name, want, id=f"{module}.{owner}.{name}")


def find(module, name):
    return getattr(importlib.import_module(module), name)


class Call:
    """A textual argument list, and the calls that it allows."""

    def __init__(self, text):
        self.args = ast.parse(f"def f{text}: pass").body[0].args
        self.positional_only = [arg.arg for arg in self.args.posonlyargs]
        self.positional = self.positional_only + [arg.arg for arg in self.args.args]
        self.required = len(self.positional) - len(self.args.defaults)

    def samples(self):
        """Tuples of positional arguments with a dictionary of keywords."""
        names = self.positional
        for count in range(self.required, len(names) + 1):
            yield ["x"] * count, {}
        if self.args.vararg:
            yield ["x"] * (len(names) + 3), {}
        keywords = [arg.arg for arg in self.args.kwonlyargs]
        lead = max(len(self.positional_only), names[:1] in (["self"], ["klass"]))
        for first in range(lead, len(names) + 1):
            yield ["x"] * first, dict.fromkeys([*names[first:], *keywords], "x")

    def defaults(self):
        """The default of each argument that has one, as text."""
        named = zip(self.positional[self.required :], self.args.defaults)
        only = zip((arg.arg for arg in self.args.kwonlyargs), self.args.kw_defaults)
        for name, default in itertools.chain(named, only):
            if default is not None:
                yield name, ast.unparse(default)


def check_call(function, text, module):
    """Fail where a function cannot be called as an argument list says."""
    real = inspect.signature(function)
    call = Call(text)
    for args, keywords in call.samples():
        real.bind(*args, **keywords)
    known = vars(importlib.import_module(module))
    for name, default in call.defaults():
        position = call.positional.index(name) if name in call.positional else None
        parameters = list(real.parameters.values())
        parameter = real.parameters.get(name) or parameters[position]
        assert parameter.default == eval(default, dict(known)), name


@pytest.mark.parametrize("module", SURFACE)
def test_module_can_be_imported(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize(("module", "name", "value"), list(entries("constants")))
def test_constant(module, name, value):
    assert find(module, name) == value
    assert type(find(module, name)) is type(value)


@pytest.mark.parametrize(("module", "name", "kind"), list(entries("values")))
def test_value(module, name, kind):
    assert kind in [klass.__name__ for klass in type(find(module, name)).__mro__]


@pytest.mark.parametrize(("module", "name", "bases"), list(entries("exceptions")))
def test_exception(module, name, bases):
    exception = find(module, name)
    for base in bases:
        assert issubclass(exception, getattr(builtins, base, None) or find(module, base))
    assert exception.__doc__


@pytest.mark.parametrize(("module", "name", "text"), list(entries("functions")))
def test_function(module, name, text):
    function = find(module, name)
    check_call(function, text, module)
    assert function.__doc__


@pytest.mark.parametrize(("module", "owner", "name", "want"), list(members()))
def test_member(module, owner, name, want):
    klass = find(module, owner)
    assert isinstance(klass, type)
    member = inspect.getattr_static(klass, name)
    if want == "value":
        getattr(klass, name)
        return
    check_call(getattr(member, "__func__", member), want, module)
    assert getattr(klass, name).__doc__


@pytest.mark.parametrize(
    "text",
    ["(a)", "(b, a)", "(a, b, c)", "(a, b=2)", "(a, b=1, *c)", "(a, b=1, *, d)", "(a=1, b=1)"],
)
def test_the_check_notices_what_does_not_fit(text):
    def function(a, b=1):
        """Stand for one of the table."""

    check_call(function, "(a, b=1)", "milter")
    if text == "(a)":
        check_call(function, text, "milter")
        return
    with pytest.raises((TypeError, AssertionError)):
        check_call(function, text, "milter")
