"""Decorators of callbacks and classes."""

from __future__ import annotations

import codecs
import inspect

import milter
import pytest
from milter import (
    ACCEPT,
    CONTINUE,
    NOREPLY,
    P_HDR_LEADSPC,
    P_NOBODY,
    P_NOHDRS,
    P_NR_BODY,
    P_NR_HDR,
    P_RCPT_REJ,
    P_SKIP,
    REJECT,
)

import Milter


def steps(klass):
    """The steps that a class asks for, of a full offer."""
    return 0x1FFFFF & ~klass.protocol_mask()


class Answers(Milter.Base):
    """A filter whose body callback returns what the test says."""

    verdict: object = CONTINUE

    @Milter.noreply
    def body(self, blk):
        return self.verdict

    @Milter.nocallback
    def header(self, field, value):
        return self.verdict


@pytest.mark.parametrize("verdict", [REJECT, ACCEPT, None, "junk"])
def test_noreply_passes_any_result_where_the_mta_waits(verdict):
    answers = Answers()
    answers.verdict = verdict
    assert answers.body(b"") is verdict


def test_noreply_says_so_where_it_was_negotiated():
    answers = Answers()
    answers._protocol = P_NR_BODY
    assert answers.body(b"") == NOREPLY


def test_noreply_looks_at_its_own_step_only():
    answers = Answers()
    answers._protocol = 0x1FFFFF & ~P_NR_BODY
    answers.verdict = REJECT
    assert answers.body(b"") == REJECT


@pytest.mark.parametrize("verdict", [REJECT, ACCEPT, None, "junk"])
def test_noreply_refuses_a_verdict_where_it_was_negotiated(verdict):
    answers = Answers()
    answers._protocol = P_NR_BODY
    answers.verdict = verdict
    with pytest.raises(RuntimeError, match=r"^body return code must be CONTINUE with @noreply"):
        answers.body(b"")


def test_noreply_methods_can_end_in_super():
    class Child(Answers):
        @Milter.noreply
        def body(self, blk):
            return super().body(blk)

    child = Child()
    child._protocol = P_NR_BODY
    assert child.body(b"") == NOREPLY
    child._protocol = 0
    assert child.body(b"") == CONTINUE


def test_a_replying_override_of_a_noreply_method_gets_its_result():
    class Child(Milter.Milter):
        def log(self, *msg):
            pass

        def hello(self, hostname):
            return super().hello(hostname)

    child = Child()
    child._protocol = 0x1FFFFF & ~Child.protocol_mask()
    assert child.hello("x") == CONTINUE
    assert child.header("a", "b") == NOREPLY


@pytest.mark.parametrize("verdict", [REJECT, NOREPLY, None])
def test_nocallback_refuses_anything_but_continue(verdict):
    answers = Answers()
    assert answers.header("a", "b") == CONTINUE
    answers.verdict = verdict
    with pytest.raises(RuntimeError, match=r"^header return code must be CONTINUE with @nocallb"):
        answers.header("a", "b")


@pytest.mark.parametrize("decorator", [Milter.noreply, Milter.nocallback])
@pytest.mark.parametrize("name", ["eom", "abort", "close", "negotiate", "helo", "log"])
def test_methods_without_the_option_are_refused(decorator, name):
    def method(self):
        return CONTINUE

    method.__name__ = name
    with pytest.raises(ValueError, match=f"non-optional method: {name} "):
        decorator(method)


@pytest.mark.parametrize("decorator", [Milter.noreply, Milter.nocallback, Milter.symlist("i")])
def test_what_has_no_name_is_refused(decorator):
    with pytest.raises(ValueError, match="needs a named method"):
        decorator(object())


@pytest.mark.parametrize("decorator", [Milter.noreply, Milter.nocallback])
def test_decorated_methods_stay_what_they_were(decorator):
    def header(self, field, value="none"):
        """Say what it is."""
        return CONTINUE

    header.extra = 1
    decorated = decorator(header)
    assert (decorated.__name__, decorated.__doc__) == ("header", "Say what it is.")
    assert decorated.__qualname__ == header.__qualname__
    assert inspect.signature(decorated) == inspect.signature(header)
    assert decorated.__wrapped__ is header
    assert decorated.extra == 1
    assert decorated(Milter.Base(), value="x", field="y") == CONTINUE


@pytest.mark.parametrize("name", sorted(Milter.OPTIONAL_CALLBACKS))
def test_each_optional_callback_has_its_bits(name):
    no_reply, no_callback = Milter.OPTIONAL_CALLBACKS[name]

    def method(self, *args):
        return CONTINUE

    method.__name__ = name
    silent = type("Silent", (Milter.Base,), {name: Milter.noreply(method)})
    off = type("Off", (silent,), {name: Milter.nocallback(method)})
    on = type("On", (off,), {name: method})
    both = no_reply | no_callback
    assert steps(Milter.Base) & both == no_callback
    assert steps(silent) & both == no_reply
    assert steps(off) & both == no_callback
    assert steps(on) & both == 0
    for klass in (silent, off, on):
        assert steps(klass) & ~both == steps(Milter.Base) & ~both


def test_marks_add_up_when_decorators_are_stacked():
    class Stacked(Milter.Base):
        @Milter.nocallback
        @Milter.noreply
        @Milter.decode("bytes")
        def header(self, field, value):
            return CONTINUE

    assert steps(Stacked) & (P_NR_HDR | P_NOHDRS) == P_NR_HDR | P_NOHDRS
    # Of the two, leaving it out is what the MTA does; called all the same, it is harmless.
    stacked = Stacked()
    stacked._protocol = P_NOHDRS
    assert stacked.header_bytes("a", b"\xff") == CONTINUE


def test_static_and_class_methods_can_be_decorated():
    class Odd(Milter.Base):
        @Milter.noreply
        @staticmethod
        def header(field, value):
            return (field, value)

        @Milter.nocallback
        @classmethod
        def body(klass, blk):
            assert klass is Odd
            return CONTINUE

        hello = staticmethod(lambda hostname: hostname)

    odd = Odd()
    assert steps(Odd) & (P_NR_HDR | P_NOBODY) == P_NR_HDR | P_NOBODY
    assert odd.header("a", "b") == ("a", "b")
    assert odd.body(b"") == CONTINUE
    assert odd.hello("x") == "x"
    assert not steps(Odd) & milter.P_NOHELO


@pytest.mark.parametrize("strategy", ["nonsense", "", "utf-8", None])
def test_decode_refuses_what_codecs_does_not_know(strategy):
    with pytest.raises(ValueError, match="neither 'bytes', 'strict' nor a codec error handler"):
        Milter.decode(strategy)


def test_decode_takes_any_error_handler():
    codecs.register_error("tests.shout", lambda error: ("!", error.end))

    class Shouts(Milter.Base):
        @Milter.decode("tests.shout")
        def header(self, field, value):
            return value

    assert Shouts().header_bytes("a", b"b\xffc") == "b!c"


def test_decode_returns_the_method_itself():
    def header(self, field, value):
        return CONTINUE

    assert Milter.decode("ignore")(header) is header


def test_symlist_limits():
    def eom(self):
        return CONTINUE

    with pytest.raises(ValueError, match="limited to 5 macros by MTA: eom lists 6"):
        Milter.symlist(*"abcdef")(eom)
    Milter.symlist(*"abcde")(eom)
    Milter.symlist("a", "e")(eom)
    with pytest.raises(ValueError, match="limited to 5 macros"):
        Milter.symlist("f")(eom)


@pytest.mark.parametrize("name", ["header", "body", "unknown", "abort", "close", "negotiate"])
def test_symlist_needs_a_macro_stage(name):
    def method(self):
        return CONTINUE

    method.__name__ = name
    with pytest.raises(ValueError, match=f"non-symlist method: {name} "):
        Milter.symlist("i")(method)


def test_enable_protocols_is_inherited_and_changes_the_class():
    class Parent(Milter.Base):
        pass

    class Child(Parent):
        def body(self, blk):
            return CONTINUE

    assert steps(Child) & (P_RCPT_REJ | P_NOBODY) == 0
    assert Milter.enable_protocols(Parent, P_RCPT_REJ) is Parent
    assert steps(Parent) & P_RCPT_REJ
    assert Parent._protocol_mask == Parent.protocol_mask()
    # Also where the child's own mask had been worked out before.
    assert steps(Child) & (P_RCPT_REJ | P_NOBODY) == P_RCPT_REJ
    assert not steps(Milter.Base) & P_RCPT_REJ
    Milter.enable_protocols(Parent, P_HDR_LEADSPC)
    assert steps(Child) & (P_RCPT_REJ | P_HDR_LEADSPC) == P_RCPT_REJ | P_HDR_LEADSPC


def test_enable_protocols_on_a_mixin():
    @Milter.header_leading_space
    class Exact:
        pass

    @Milter.rejected_recipients
    class Sees:
        pass

    class Both(Exact, Sees, Milter.Base):
        pass

    wanted = P_HDR_LEADSPC | P_RCPT_REJ | P_SKIP
    assert steps(Both) & wanted == wanted


@pytest.mark.parametrize(
    ("decorator", "flag"),
    [
        (Milter.rejected_recipients, P_RCPT_REJ),
        (Milter.header_leading_space, P_HDR_LEADSPC),
    ],
)
def test_class_decorators_go_through_the_package(decorator, flag, monkeypatch):
    class Filter(Milter.Base):
        pass

    assert decorator(Filter) is Filter
    assert steps(Filter) & (P_RCPT_REJ | P_HDR_LEADSPC) == flag
    calls = []
    monkeypatch.setattr(Milter, "enable_protocols", lambda *args: calls.append(args))
    decorator(Filter)
    assert calls == [(Filter, flag)]
