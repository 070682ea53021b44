"""From the extension's callbacks to filter objects, and the call that runs it all.

What applications may replace, ``factory`` and the functions of the package, is looked up on
the package when it is called.
"""

from __future__ import annotations

import sys
import threading

import milter

import Milter

from ._later import Later, is_awaitable, set_loop_factory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable
    from typing import Any

    from milter import milterContext

    from ._types import Address

_seq_lock = threading.Lock()  # applications know it; the extension counts without it
_attaching = threading.Lock()


def uniqueID() -> int:
    """Give out a number that no other call in this filter got.

    Filters use it to tell connections apart in logs. It is safe in any thread, and the worker
    processes of one filter, those that were started anew included, share one sequence.

    Returns:
        1 in the first call, then always one more.
    """
    return milter._unique_id()


def _new_filter(ctx: milterContext) -> Any:
    """Make the connection's filter object and attach it.

    Raises milter.error where ``Milter.factory`` gives out one that serves another connection: what
    it did for that one would be done to the mail of this one.
    """
    filter_object = Milter.factory()
    with _attaching:
        other = getattr(filter_object, "_ctx", None)
        if other is not None and other.getpriv() is filter_object:
            raise milter.error(
                f"factory: the {type(filter_object).__name__} that it returned serves another "
                "connection; it must make one for each"
            )
        filter_object._setctx(ctx)
    return filter_object


def _filter_of(ctx: milterContext) -> Any:
    """The connection's filter object, which is made here if there was no negotiation.

    sendmail plays further sessions on a connection without negotiating again, and they begin with
    whatever it was told to send.
    """
    filter_object = ctx.getpriv()
    if filter_object is None:
        filter_object = _new_filter(ctx)
        if getattr(ctx, "actions", 0):
            filter_object._actions, filter_object._protocol = ctx.actions, ctx.protocol
    return filter_object


def negotiate_callback(ctx: milterContext, opts: list[int]) -> int:
    """Make the connection's filter object and let it negotiate.

    Args:
        ctx: the connection's context.
        opts: the MTA's offer, changed in place; see ``Base.negotiate``.

    Returns:
        What ``negotiate`` of the filter object returns.
    """
    verdict: int = _new_filter(ctx).negotiate(opts)
    return verdict


def connect_callback(
    ctx: milterContext,
    hostname: str,
    family: int,
    hostaddr: Address,
    nr_mask: int = milter.P_NR_CONN,
) -> int:
    """Pass a new client on to the connection's filter object.

    The object is made here if there was no negotiation.

    Args:
        ctx: the connection's context.
        hostname: see ``Base.connect``.
        family: see ``Base.connect``.
        hostaddr: see ``Base.connect``.
        nr_mask: the step that allows NOREPLY here; where it was not negotiated, NOREPLY
            is turned into CONTINUE.

    Returns:
        What ``connect`` of the filter object returns.
    """
    filter_object = _filter_of(ctx)
    verdict: int = filter_object.connect(hostname, family, hostaddr)
    if filter_object._protocol & nr_mask:
        return verdict
    if is_awaitable(verdict):
        later: Any = Later(verdict, _with_reply)  # type: ignore[arg-type]
        return later  # type: ignore[no-any-return]
    return _with_reply(verdict)


def _with_reply(verdict: int) -> int:
    """A verdict where NOREPLY was not negotiated: CONTINUE in its place."""
    return milter.CONTINUE if verdict == milter.NOREPLY else verdict


def close_callback(ctx: milterContext) -> int:
    """End a connection: call ``close`` of its filter object and detach that.

    It is detached even if ``close`` raises.

    Args:
        ctx: the connection's context.

    Returns:
        What ``close`` returns, or CONTINUE where there is no filter object.
    """
    filter_object = ctx.getpriv()
    if filter_object is None:
        return milter.CONTINUE
    waits = False

    def detach() -> None:
        filter_object._setctx(None)
        ctx.setpriv(None)

    try:
        verdict: int = filter_object.close()
        waits = is_awaitable(verdict)
    finally:
        if not waits:
            detach()
    if waits:
        later: Any = Later(verdict, last=detach)  # type: ignore[arg-type]
        return later  # type: ignore[no-any-return]
    return verdict


#: Each callback of the extension and the road from there to the filter object. The functions
#: that only pass their arguments on to a method are never run in a filter: the extension
#: knows them (``_call_objects``) and calls the method itself.
CALLBACKS: dict[str, Callable[..., Any]] = {
    "negotiate": lambda ctx, opts: Milter.negotiate_callback(ctx, opts),
    "connect": lambda ctx, *args: Milter.connect_callback(ctx, *args),
    "helo": lambda ctx, hostname: _filter_of(ctx).hello(hostname),
    "envfrom": lambda ctx, *args: _filter_of(ctx).envfrom_bytes(*args),
    "envrcpt": lambda ctx, *args: _filter_of(ctx).envrcpt_bytes(*args),
    "data": lambda ctx: _filter_of(ctx).data(),
    "header": lambda ctx, name, value: _filter_of(ctx).header_bytes(name, value),
    "eoh": lambda ctx: _filter_of(ctx).eoh(),
    "body": lambda ctx, chunk: _filter_of(ctx).body(chunk),
    "eom": lambda ctx: _filter_of(ctx).eom(),
    "abort": lambda ctx: _filter_of(ctx).abort(),
    "unknown": lambda ctx, command: _filter_of(ctx).unknown(command),
    "close": lambda ctx: Milter.close_callback(ctx),
}

#: The callbacks that ``milter.register`` takes; the others have a function to set them.
_REGISTERED = ("negotiate", "data", "unknown")


def register_callbacks(name: str) -> None:
    """Have the extension call the filter objects that ``Milter.factory`` makes.

    Args:
        name: the filter's name, for logs and error replies.
    """
    milter._call_objects(CALLBACKS)
    for callback, function in CALLBACKS.items():
        if callback not in _REGISTERED:
            getattr(milter, f"set_{callback}_callback")(function)
    milter.register(name, **{callback: CALLBACKS[callback] for callback in _REGISTERED})


def runmilter(
    name: str,
    socketname: str,
    timeout: float = 0,
    rmsock: bool = True,
    *,
    drain_timeout: float | None = None,
    workers: int = 1,
    worker_init: Callable[[], object] | None = None,
    pin_workers: bool = False,
    socket_mode: int | None = None,
    socket_group: str | int | None = None,
    user: str | int | None = None,
    group: str | int | None = None,
    engine: str | None = None,
    loop_factory: Callable[[], AbstractEventLoop] | None = None,
) -> None:
    """Run the filter: open its socket, serve the MTA, return when stopped.

    It returns after ``Milter.stop()``, or after SIGTERM, SIGINT or SIGHUP where the program
    has no handler of its own for the signal. What the filter is, ``Milter.factory`` says.

    Args:
        name: the filter's name, for logs and error replies.
        socketname: where to listen, in libmilter's form: ``"unix:/path"``,
            ``"inet:port@host"`` or ``"inet6:port@[address]"``.
        timeout: how many seconds libmilter waits for the MTA to read or write before it
            gives the connection up; 0 keeps libmilter's own 7,210.
        rmsock: whether a unix socket that is left over at that path may be removed.
        drain_timeout: how many seconds messages in progress may take after a stop; None
            keeps the 30 s of the extension.
        workers: how many processes serve; 0 means one for each core that this process may
            use, 1 means this process itself. With more, this process forks and supervises
            them: it starts anew those that die, has all stop when it is stopped, and returns
            when they have. The program around this call runs on here only.
        worker_init: called without arguments in each worker before its first connection, to
            open what cannot be shared with other processes (databases, threads). What it
            raises ends the worker.
        pin_workers: whether each of several processes keeps to one core, the next one to the
            next (Linux, FreeBSD). That is faster where they keep all cores busy; programs that
            callbacks start are bound to the same core.
        socket_mode: of the unix socket, such as 0o660: who may connect. There is no moment in
            which others could. With none of these four arguments it is what the umask leaves;
            with any other of them 0o660.
        socket_group: group of the unix socket, name or number: one that the MTA is in.
        user: who this process becomes once the socket is open, name or number; only root can
            choose. Root is given up for good, before workers are forked and ``worker_init``
            is called.
        group: of the process then, name or number; by default that of the user.
        engine: who speaks to the MTA: ``"libmilter"``, the default, or ``"native"``, which is
            faster; for the filter both are the same. None leaves what ``milter.set_engine`` or
            the environment variable ``PYMILTER_ENGINE`` says.
        loop_factory: called without arguments for the event loop that awaits callbacks which are
            coroutines, such as ``uvloop.new_event_loop``; None is ``asyncio.new_event_loop``. The
            loop has a thread of its own, which begins when it is first needed, and ends with the
            filter; with workers each process has one.

    With ``socket_mode``, ``socket_group`` or ``user`` a unix socket is refused in a directory
    where somebody else could put another in its place; without, that is only warned of. The log
    is also told of a filter that goes on as root, and of a TCP socket that whoever reaches it
    can use: the milter protocol has no authentication.

    Raises:
        milter.error: it cannot start or cannot go on; the message and the cause say why. With
            workers also where other threads run, where workers die at once time and again,
            and, after a stop, where one had to be killed or crashed.
        TypeError: ``workers`` is no int, ``worker_init`` or ``loop_factory`` cannot be called, or
            ``pin_workers`` is no bool.
        ValueError: an argument is refused (such an error is also a ``milter.error``).
    """
    from . import _socket_setup

    _end_leftover_loop()
    count = 1
    if type(workers) is not int or workers != 1 or worker_init is not None or pin_workers:
        from . import _workers  # what it takes is no burden for a filter of one process

        count = _workers.worker_count(workers)
        _workers.check_worker_init(worker_init)
        _workers.check_pinning(pin_workers)
        if count > 1:
            _workers.check_threads()
    set_loop_factory(loop_factory)
    _set_up(name, socketname, timeout, drain_timeout, engine)
    access = _socket_setup.Access(socketname, socket_mode, socket_group, user, group)
    access.open(rmsock)
    if count > 1:
        _workers.supervise(count, worker_init, pin=pin_workers)
        return
    if worker_init is not None:
        try:
            worker_init()
        except BaseException:
            _socket_setup.shut()
            raise
    milter.main()


def _end_leftover_loop() -> None:
    """That of the stand-in, where a test used it: it may be of another kind, and has a thread."""
    coroutines = sys.modules.get(f"{__package__}._async")
    if coroutines is not None:
        coroutines.end_leftover()


def _set_up(
    name: str, socketname: str, timeout: float, drain_timeout: float | None, engine: str | None
) -> None:
    """All that comes before the socket is opened."""
    if engine is not None:
        milter.set_engine(engine)
    milter.setconn(socketname)
    if timeout:
        milter.settimeout(-int(-timeout // 1))
    if drain_timeout is not None:
        milter.set_drain_timeout(drain_timeout)
    register_callbacks(name)


async def serve(
    name: str,
    socketname: str,
    timeout: float = 0,
    rmsock: bool = True,
    *,
    drain_timeout: float | None = None,
    socket_mode: int | None = None,
    socket_group: str | int | None = None,
    user: str | int | None = None,
    group: str | int | None = None,
    engine: str | None = None,
) -> None:
    """Serve in the event loop that runs, for programs that do other things beside.

    Callbacks that are coroutines run in this loop; plain ones on threads of the engine, as ever.
    Where there are no plain ones, the loop waits for the connections of the engine ``native`` too.
    Signals are left to the program.

    When its task is cancelled, the filter drains, which takes up to ``drain_timeout`` seconds, and
    this ends with ``CancelledError``; further cancelling changes nothing. After ``Milter.stop()``
    it drains and returns. The loop has to go on running meanwhile.

    Args:
        name: see ``runmilter``, like all others.
        socketname: where to listen.
        timeout: how many seconds to wait for the MTA.
        rmsock: whether a unix socket that is left over may be removed.
        drain_timeout: how many seconds messages in progress may take at the end.
        socket_mode: of the unix socket.
        socket_group: of the unix socket.
        user: who this process becomes once the socket is open.
        group: of the process then.
        engine: who speaks to the MTA.

    Raises:
        milter.error: no event loop of asyncio runs, a filter runs already in this process, or one
            of the reasons for which ``runmilter`` raises it.
        ValueError: an argument is refused (such an error is also a ``milter.error``).
    """
    from . import _async, _socket_setup

    if milter._is_running():
        raise milter.error("serve: a filter runs already; there is one to a process")
    runner = _async.bind()
    try:
        _set_up(name, socketname, timeout, drain_timeout, engine)
        access = _socket_setup.Access(socketname, socket_mode, socket_group, user, group)
        access.open(rmsock)
        await _async.run_beside(runner, milter.main, _socket_setup.shut)
    finally:
        await _async.unbind()
