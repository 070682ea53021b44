"""From the extension's callbacks to filter objects, and what runmilter sets up."""

from __future__ import annotations

import threading

import milter
import pytest
from milter import CONTINUE, CURR_ACTS, NOREPLY, P_NR_CONN, REJECT, TEMPFAIL

import Milter
from Milter.testctx import TestCtx


@pytest.fixture
def extension(monkeypatch):
    """What runmilter calls in the extension, in order, as ``(name, args, keywords)``."""
    calls = []

    def record(name):
        def call(*args, **keywords):
            calls.append((name, args, keywords))

        monkeypatch.setattr(milter, name, call)

    setters = "connect helo envfrom envrcpt header eoh body eom abort close"
    for name in setters.split():
        record(f"set_{name}_callback")
    for name in ("setconn", "settimeout", "set_drain_timeout", "register", "opensocket", "main"):
        record(name)
    return calls


def registered(calls):
    """The callbacks that were handed to the extension, by name."""
    callbacks = {
        name[len("set_") : -len("_callback")]: args[0]
        for name, args, _ in calls
        if name.startswith("set_") and name.endswith("_callback")
    }
    (keywords,) = [keywords for name, _, keywords in calls if name == "register"]
    return {**callbacks, **keywords}


class Noisy(Milter.Base):
    """A filter that notes each callback, in a list of its class."""

    calls: list

    def _note(self, *call):
        self.calls.append(call)
        return REJECT

    def connect(self, hostname, family, hostaddr):
        return self._note("connect", hostname, family, hostaddr)

    def hello(self, hostname):
        return self._note("hello", hostname)

    def envfrom(self, f, *params):
        return self._note("envfrom", f, *params)

    def envrcpt(self, to, *params):
        return self._note("envrcpt", to, *params)

    def data(self):
        return self._note("data")

    def header(self, field, value):
        return self._note("header", field, value)

    def eoh(self):
        return self._note("eoh")

    def body(self, blk):
        return self._note("body", blk)

    def unknown(self, cmd):
        return self._note("unknown", cmd)

    def eom(self):
        return self._note("eom")

    def abort(self):
        return self._note("abort")

    def close(self):
        return self._note("close")


@pytest.fixture
def noisy(monkeypatch):
    """A class of filters that note their callbacks, as the factory."""
    klass = type("Noisy", (Noisy,), {"calls": []})
    monkeypatch.setattr(Milter, "factory", klass)
    return klass


def test_runmilter_sets_up_the_socket_before_it_serves(extension):
    Milter.runmilter("name", "inet:8800@127.0.0.1")
    order = [(name, args) for name, args, _ in extension if not name.endswith("_callback")]
    assert order == [
        ("setconn", ("inet:8800@127.0.0.1",)),
        ("register", ("name",)),
        ("opensocket", (True,)),
        ("main", ()),
    ]


def test_runmilter_passes_its_options_on(extension):
    Milter.runmilter("name", "unix:/x", timeout=240, rmsock=False, drain_timeout=0)
    calls = {name: args for name, args, _ in extension}
    assert calls["settimeout"] == (240,)
    assert calls["set_drain_timeout"] == (0,)
    assert calls["opensocket"] == (False,)


@pytest.mark.parametrize(("timeout", "seconds"), [(0.2, 1), (7.5, 8), (3, 3), (-1, -1)])
def test_a_timeout_is_never_rounded_down_to_none(extension, timeout, seconds):
    Milter.runmilter("name", "unix:/x", timeout)
    assert [args for name, args, _ in extension if name == "settimeout"] == [(seconds,)]


@pytest.mark.parametrize("failing", ["setconn", "register", "opensocket", "main"])
def test_runmilter_raises_the_true_cause(extension, monkeypatch, failing):
    cause = milter.error(f"{failing} failed")

    def fail(*args, **keywords):
        raise cause

    monkeypatch.setattr(milter, failing, fail)
    with pytest.raises(milter.error) as caught:
        Milter.runmilter("name", "unix:/x")
    assert caught.value is cause
    assert "main" not in [name for name, _, _ in extension]


def test_every_callback_reaches_the_filter(extension, noisy):
    Milter.runmilter("name", "unix:/x")
    callbacks = registered(extension)
    ctx = TestCtx()
    ctx._setsymval("i", "X")
    filter_object = noisy()
    filter_object._setctx(ctx)
    sent = [
        ("connect", "host", 2, ("192.0.2.1", 25)),
        ("helo", "host"),
        ("envfrom", b"<a@\xff>", b"SIZE=1"),
        ("envrcpt", b"<b@c>"),
        ("data",),
        ("header", "X", b"\xff"),
        ("eoh",),
        ("body", b"chunk"),
        ("eom",),
        ("unknown", "XYZZY"),
        ("abort",),
        ("close",),
    ]
    assert set(callbacks) == {name for name, *_ in sent} | {"negotiate"}
    for name, *args in sent:
        assert callbacks[name](ctx, *args) == REJECT
    assert noisy.calls == [
        ("connect", "host", 2, ("192.0.2.1", 25)),
        ("hello", "host"),
        ("envfrom", "<a@\udcff>", "SIZE=1"),
        ("envrcpt", "<b@c>"),
        ("data",),
        ("header", "X", "\udcff"),
        ("eoh",),
        ("body", b"chunk"),
        ("eom",),
        ("unknown", "XYZZY"),
        ("abort",),
        ("close",),
    ]


def test_replaced_functions_take_effect_after_registration(extension, monkeypatch):
    Milter.runmilter("name", "unix:/x")
    callbacks = registered(extension)
    ctx = TestCtx()
    for name in ("negotiate", "connect", "close"):
        monkeypatch.setattr(Milter, f"{name}_callback", lambda *args, name=name: (name, *args))
    assert callbacks["negotiate"](ctx, [1, 2, 0, 0]) == ("negotiate", ctx, [1, 2, 0, 0])
    assert callbacks["connect"](ctx, "h", 0, None) == ("connect", ctx, "h", 0, None)
    assert callbacks["close"](ctx) == ("close", ctx)


def test_the_factory_is_looked_up_at_each_connection(monkeypatch):
    class First(Milter.Base):
        pass

    class Second(Milter.Base):
        pass

    contexts = []
    for factory in (First, Second, lambda: First()):
        monkeypatch.setattr(Milter, "factory", factory)
        contexts.append(TestCtx())
        assert Milter.negotiate_callback(contexts[-1], [CURR_ACTS, 0, 0, 0]) == CONTINUE
    assert [type(ctx.getpriv()) for ctx in contexts] == [First, Second, First]
    assert all(ctx.getpriv()._ctx is ctx for ctx in contexts)


def test_negotiate_returns_what_the_filter_does(monkeypatch):
    class Refuses(Milter.Base):
        def negotiate(self, opts):
            opts[1] = 5
            return REJECT

    monkeypatch.setattr(Milter, "factory", Refuses)
    opts = [1, 2, 0, 0]
    assert Milter.negotiate_callback(TestCtx(), opts) == REJECT
    assert opts == [1, 5, 0, 0]


def test_connect_makes_the_filter_where_the_mta_did_not_negotiate(noisy):
    ctx = TestCtx()
    assert Milter.connect_callback(ctx, "host", 0, None) == REJECT
    made = ctx.getpriv()
    assert isinstance(made, noisy)
    assert made._ctx is ctx
    Milter.connect_callback(ctx, "host", 0, None)
    assert ctx.getpriv() is made


def test_connect_keeps_a_filter_that_counts_as_false(monkeypatch):
    class Empty(Milter.Base):
        def __len__(self):
            return 0

    monkeypatch.setattr(Milter, "factory", Empty)
    ctx = TestCtx()
    Milter.negotiate_callback(ctx, [CURR_ACTS, 0, 0, 0])
    made = ctx.getpriv()
    assert Milter.connect_callback(ctx, "host", 0, None) == CONTINUE
    assert ctx.getpriv() is made
    assert Milter.close_callback(ctx) == CONTINUE
    assert ctx.getpriv() is None


def test_a_further_session_takes_over_what_was_agreed(noisy):
    class Agreed(TestCtx):
        actions = milter.ADDHDRS
        protocol = P_NR_CONN

    ctx = Agreed()
    Milter.connect_callback(ctx, "host", 0, None)
    assert (ctx.getpriv()._actions, ctx.getpriv()._protocol) == (milter.ADDHDRS, P_NR_CONN)


def test_a_context_that_tells_nothing_leaves_the_defaults(noisy):
    class Bare:
        """What an application's own tests may use for a context."""

        kept = None

        def getpriv(self):
            return self.kept

        def setpriv(self, priv):
            self.kept = priv

    ctx = Bare()
    Milter.connect_callback(ctx, "host", 0, None)
    assert (ctx.kept._actions, ctx.kept._protocol) == (CURR_ACTS, 0)


@pytest.mark.parametrize(
    ("protocol", "mask", "expected"),
    [
        (0, (), CONTINUE),
        (P_NR_CONN, (), NOREPLY),
        (P_NR_CONN, (milter.P_NR_HELO,), CONTINUE),
        (milter.P_NR_HELO, (milter.P_NR_HELO,), NOREPLY),
    ],
)
def test_connect_turns_noreply_that_was_not_agreed_into_continue(
    protocol, mask, expected, monkeypatch
):
    class Silent(Milter.Base):
        def connect(self, hostname, family, hostaddr):
            self._protocol = protocol
            return NOREPLY

    monkeypatch.setattr(Milter, "factory", Silent)
    assert Milter.connect_callback(TestCtx(), "host", 0, None, *mask) == expected


def test_close_calls_the_filter_and_detaches_it(noisy):
    ctx = TestCtx()
    Milter.connect_callback(ctx, "host", 0, None)
    filter_object = ctx.getpriv()
    assert Milter.close_callback(ctx) == REJECT
    assert (filter_object._ctx, ctx.getpriv()) == (None, None)
    assert Milter.close_callback(ctx) == CONTINUE
    assert [call[0] for call in noisy.calls] == ["connect", "close"]


def test_close_detaches_also_when_the_filter_raises(monkeypatch):
    class Fails(Milter.Base):
        def close(self):
            assert self._ctx is ctx  # it can still use its context
            raise RuntimeError("no way")

    monkeypatch.setattr(Milter, "factory", Fails)
    ctx = TestCtx()
    Milter.connect_callback(ctx, "host", 0, None)
    filter_object = ctx.getpriv()
    with pytest.raises(RuntimeError, match="no way"):
        Milter.close_callback(ctx)
    assert (filter_object._ctx, ctx.getpriv()) == (None, None)


def test_a_filter_of_ones_own_needs_only_the_package_functions(noisy):
    """An application's own runmilter: the package's callbacks and lambdas over getpriv()."""
    ctx = TestCtx()
    assert Milter.negotiate_callback(ctx, [CURR_ACTS, 0, 0, 0]) == CONTINUE
    assert (lambda ctx: ctx.getpriv().eom())(ctx) == REJECT
    noisy.eom = lambda self: TEMPFAIL
    assert (lambda ctx: ctx.getpriv().eom())(ctx) == TEMPFAIL


def test_unique_ids_are_unique_in_all_threads():
    threads_count, ids_count = 8, 500
    start = threading.Barrier(threads_count)
    taken = []

    def take():
        start.wait(10)
        ids = [Milter.uniqueID() for _ in range(ids_count)]
        assert ids == sorted(ids)
        taken.extend(ids)

    before = Milter._seq
    threads = [threading.Thread(target=take) for _ in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(taken) == list(range(before + 1, before + 1 + threads_count * ids_count))
    assert Milter._seq == max(taken)
