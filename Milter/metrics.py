"""What a filter does, in numbers: how many messages, which verdicts, how long callbacks take.

::

    import Milter.metrics

    Milter.metrics.enable()                 # before runmilter()
    Milter.metrics.serve_prometheus(9801)   # where Prometheus collects, if wanted
    Milter.runmilter("myfilter", "unix:/run/myfilter/socket")

The extension counts, at the price of two looks at the clock for each callback; ``snapshot()``
reads the counters at any time, in any thread. Worker processes (``runmilter(workers=...)``) share
them if they are switched on before: each process can tell the sum over all. There,
``serve_prometheus`` is called in ``worker_init``, and whichever worker is asked answers for all.

The exporter needs prometheus-client, which the extra ``metrics`` installs
(``pip install 'pymilter[metrics]'``); it is imported at first use.
"""

from __future__ import annotations

import dataclasses
import math
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import milter

from ._extras import unusable
from ._logging import logger

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from ._metrics_http import Server

__all__ = [
    "BOUNDS",
    "Collector",
    "PrometheusServer",
    "Snapshot",
    "Stage",
    "disable",
    "enable",
    "serve_prometheus",
    "snapshot",
]

_log = logger("milter.metrics")

#: The upper bounds of ``Stage.buckets`` in seconds, 1 µs, 2 µs, 4 µs, ... 16.8 s, infinity.
BOUNDS: tuple[float, ...] = (*(2**power / 1e6 for power in range(25)), math.inf)

#: The verdicts as libmilter numbers them (<libmilter/mfapi.h>).
_VERDICTS = {
    value: name
    for name, value in vars(milter).items()
    if name in ("CONTINUE", "REJECT", "DISCARD", "ACCEPT", "TEMPFAIL", "NOREPLY", "SKIP")
}
#: Nobody waits for what these return.
_WITHOUT_VERDICT = ("abort", "close")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What happened in the callbacks of one step of the SMTP dialogue.

    Attributes:
        verdicts: how often the MTA was given which verdict, by name (``"CONTINUE"``, ...).
            Those that the extension itself gives, for an exception or while the filter
            stops, are among them; ``"NOREPLY"`` is none that was sent, be it as the MTA
            does not wait for one or has hung up meanwhile. Empty for ``abort`` and
            ``close``, which have none.
        exceptions: how many callbacks ended with an exception, or with no verdict.
        seconds: the time spent in all of them, from getting the interpreter's lock on.
        buckets: how many took less than the bound of that place in ``BOUNDS``, and not less
            than the one before.
    """

    verdicts: Mapping[str, int]
    exceptions: int
    seconds: float
    buckets: tuple[int, ...]

    @property
    def calls(self) -> int:
        """How many callbacks there were."""
        return sum(self.buckets)

    def quantile(self, share: float) -> float:
        """The time within which that share of the callbacks ended.

        Args:
            share: from 0 to 1; 0.99 is for all but the slowest hundredth.

        Returns:
            An upper bound in seconds, one of ``BOUNDS``; 0.0 where there was no callback.

        Raises:
            ValueError: ``share`` is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share!r}")
        wanted, seen = share * self.calls, 0
        for bound, count in zip(BOUNDS, self.buckets):
            seen += count
            if seen > 0 and seen >= wanted:
                return bound
        return 0.0

    def __sub__(self, earlier: Stage) -> Stage:
        """What happened since ``earlier``."""
        if not isinstance(earlier, Stage):
            return NotImplemented
        return Stage(
            {
                name: number
                for name, count in self.verdicts.items()
                if (number := count - earlier.verdicts.get(name, 0))
            },
            self.exceptions - earlier.exceptions,
            self.seconds - earlier.seconds,
            tuple(now - then for now, then in zip(self.buckets, earlier.buckets)),
        )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The counters at one moment; ``later - earlier`` is what happened between the two.

    Attributes:
        connections: how many SMTP sessions the filter has had.
        open_connections: how many of these have not been closed; not a counter, so a
            difference has that of the later one.
        messages: how many messages have begun.
        stages: a ``Stage`` for each step, by the name of its callback: ``negotiate``,
            ``connect``, ``helo``, ``envfrom``, ``envrcpt``, ``data``, ``header``, ``eoh``,
            ``body``, ``eom``, ``abort``, ``close``, ``unknown``.
    """

    connections: int
    open_connections: int
    messages: int
    stages: Mapping[str, Stage]

    def __sub__(self, earlier: Snapshot) -> Snapshot:
        """What happened since ``earlier``."""
        if not isinstance(earlier, Snapshot):
            return NotImplemented
        return Snapshot(
            self.connections - earlier.connections,
            self.open_connections,
            self.messages - earlier.messages,
            {name: stage - earlier.stages[name] for name, stage in self.stages.items()},
        )


def enable() -> None:
    """Begin to count, or go on after ``disable()``.

    Call it before ``runmilter``: what is switched on in a worker process is that worker's own.

    Raises:
        milter.error: there is no memory for the counters.
    """
    if milter._metrics_snapshot()["place"] > 0 and not milter._metrics(True):
        _log.warning("metrics.enable() in a worker process: it counts for itself; call it earlier")
    milter._metrics(True)


def disable() -> None:
    """Stop counting; what was counted is kept."""
    milter._metrics(False)


def snapshot() -> Snapshot:
    """Read the counters: of this process, and of the worker processes that share them."""
    found = milter._metrics_snapshot()
    return Snapshot(
        found["connections"],
        found["open"],
        found["messages"],
        {name: _stage(name, *counters) for name, counters in found["stages"].items()},
    )


def _stage(
    name: str,
    verdicts: tuple[int, ...],
    exceptions: int,
    nanoseconds: int,
    buckets: tuple[int, ...],
) -> Stage:
    named = {
        _VERDICTS[value]: count
        for value, count in enumerate(verdicts)
        if count and name not in _WITHOUT_VERDICT
    }
    return Stage(named, exceptions, nanoseconds / 1e9, buckets)


# --- Prometheus ----------------------------------------------------------------------------------


def _prometheus() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
        import prometheus_client.exposition
    except ImportError as exc:
        raise unusable("the exporter", "prometheus-client", "prometheus_client", exc) from exc
    return prometheus_client


class Collector:
    """The counters for a registry of prometheus_client: ``REGISTRY.register(Collector())``.

    They are ``milter_connections_total``, ``milter_connections_open``, ``milter_messages_total``,
    ``milter_verdicts_total`` (labels ``stage``, ``verdict``), ``milter_exceptions_total``
    (label ``stage``) and the histogram ``milter_callback_seconds`` (label ``stage``).

    Raises:
        ImportError: prometheus-client is missing; the message names the extra to install.
    """

    def __init__(self) -> None:
        self._core = _prometheus().core

    def describe(self) -> Iterable[Metric]:
        """The names, without a look at the counters."""
        return self._families(Snapshot(0, 0, 0, {}))

    def collect(self) -> Iterable[Metric]:
        """The counters as they are now."""
        return self._families(snapshot())

    def _families(self, now: Snapshot) -> Iterable[Metric]:
        counter, gauge = self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        yield counter("milter_connections", "SMTP sessions.", now.connections)
        yield gauge("milter_connections_open", "Sessions not closed yet.", now.open_connections)
        yield counter("milter_messages", "Messages begun.", now.messages)
        verdicts = counter(
            "milter_verdicts", "Verdicts that the MTA was given.", labels=["stage", "verdict"]
        )
        exceptions = counter(
            "milter_exceptions", "Callbacks that ended with an exception.", labels=["stage"]
        )
        times = self._core.HistogramMetricFamily(
            "milter_callback_seconds", "Time spent in callbacks.", labels=["stage"]
        )
        for name, stage in now.stages.items():
            for verdict, count in stage.verdicts.items():
                verdicts.add_metric([name, verdict], count)
            exceptions.add_metric([name], stage.exceptions)
            times.add_metric([name], _cumulative(stage), stage.seconds)
        yield from (verdicts, exceptions, times)


def _cumulative(stage: Stage) -> list[tuple[str, int]]:
    total, buckets = 0, []
    for bound, count in zip(BOUNDS, stage.buckets):
        total += count
        buckets.append(("+Inf" if bound == math.inf else repr(bound), total))
    return buckets


class PrometheusServer:
    """What ``serve_prometheus`` starts; ends with the process, or by ``close()``.

    Attributes:
        port: where it listens.
    """

    def __init__(self, server: Server) -> None:
        self.port: int = server.port
        self._server = server
        self._thread = threading.Thread(target=server.serve, name="milter-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and close the port."""
        self._server.stop()
        self._thread.join()


def _application(registry: CollectorRegistry | None = None) -> Any:
    """What answers requests, a WSGI application; ImportError without prometheus-client."""
    client = _prometheus()
    if registry is None:
        registry = client.CollectorRegistry()
        registry.register(Collector())
    return client.exposition.make_wsgi_app(registry)


def serve_prometheus(
    port: int, addr: str = "127.0.0.1", registry: CollectorRegistry | None = None
) -> PrometheusServer:
    """Answer Prometheus over HTTP, in a thread of its own.

    Nothing asks who is asking: other machines should get at the port only where that does
    no harm. Clients that send nothing, or too much, cannot take what mail needs: that thread
    serves 16 at once, for 10 seconds each at most. With worker processes call it in
    ``worker_init``, as threads cannot be there before the workers are; they share the port.

    Args:
        port: where to listen; 0 takes a free port, see the result.
        addr: the address to listen on, of this machine only by default.
        registry: what to show; by default a registry with a ``Collector`` and nothing else.

    Raises:
        ImportError: prometheus-client is missing; the message names the extra to install.
        OSError: it cannot listen there.
    """
    app = _application(registry)
    from ._metrics_http import Server, listen  # takes memory that most filters need not

    family = socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM)[0][0]
    in_worker = milter._metrics_snapshot()["place"] > 0
    try:
        server = Server(listen((addr, port), family, in_worker and port != 0), app)
    except OSError as exc:
        raise OSError(
            exc.errno, f"cannot serve metrics on {addr} port {port}: {exc.strerror}"
        ) from exc
    _log.info("metrics are on http://%s:%d/metrics", addr, server.port)
    return PrometheusServer(server)
