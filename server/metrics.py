"""Every Prometheus object of the server, on a registry of its own.

Labels are from small fixed sets: endpoints, statuses, reasons, what the checkpoint is. Nothing of a request (text,
token, id, tenant, whether it was private) is ever one. Knows no tensors and no HTTP framework beyond plain ASGI.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.async_engine import AsyncEngine, StepStats
from server.engine.request import Delta

ENDPOINTS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
        "/tokenize",
        "/detokenize",
        "/version",
    }
)
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_MEMBERS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """What the server counts. Written on the event loop alone."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "motserve_http_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "motserve_http_request_seconds",
            "From request to the end of the answer",
            ["endpoint"],
            buckets=_LATENCIES,
            registry=registry,
        )
        self._finished = Counter(
            "motserve_sequences_finished", "Sequences by how they ended", ["reason"], registry=registry
        )
        self._cut_off = Counter(
            "motserve_requests_cut_off", "Generations that did not finish, by cause", ["cause"], registry=registry
        )
        self._first_token = Histogram(
            "motserve_time_to_first_token_seconds",
            "From submission to a sequence's first token",
            buckets=_LATENCIES,
            registry=registry,
        )
        self._token_gap = LoopHistogram("motserve_inter_token_seconds", "Between two tokens of a sequence", _TOKEN_GAPS)
        registry.register(self._token_gap)
        self._completion_tokens = Counter("motserve_completion_tokens", "Tokens handed to clients", registry=registry)
        self._define_engine_metrics(registry)
        self._define_gauges(engine, model_name, registry)
        engine.observe(self._on_step)

    def _define_engine_metrics(self, registry: CollectorRegistry) -> None:
        self._step_seconds = Histogram(
            "motserve_engine_step_seconds", "One engine step", buckets=_TOKEN_GAPS, registry=registry
        )
        self._prefill_tokens = Counter("motserve_prefill_tokens", "Prompt tokens computed", registry=registry)
        self._decode_tokens = Counter("motserve_decode_tokens", "Tokens decoded", registry=registry)
        self._groups = Counter("motserve_public_groups", "Groups of public tokens computed", registry=registry)
        self._public_tokens = Counter("motserve_public_tokens", "Live members of public groups", registry=registry)
        self._private_tokens = Counter("motserve_private_tokens", "Tokens computed privately", registry=registry)
        self._reused = Counter(
            "motserve_prefix_tokens_reused", "Prompt tokens found in the prefix cache", registry=registry
        )
        self._swapped = Counter("motserve_sequences_swapped_out", "Sequences that made room", registry=registry)
        self._members = Histogram(
            "motserve_group_live_members",
            "Mean live members of a step's public groups",
            buckets=_MEMBERS,
            registry=registry,
        )

    def _define_gauges(self, engine: AsyncEngine, model_name: str, registry: CollectorRegistry) -> None:
        """Read from the engine when they are asked for."""
        Gauge("motserve_ready", "1 while the engine runs", registry=registry).set_function(lambda: engine.ready)
        Gauge("motserve_sequences_running", "Sequences under way", registry=registry).set_function(
            lambda: engine.stats.running
        )
        Gauge("motserve_sequences_waiting", "Sequences queued", registry=registry).set_function(
            lambda: engine.stats.waiting
        )
        Gauge("motserve_kv_blocks", "Blocks of the KV cache", registry=registry).set_function(
            lambda: engine.stats.kv_blocks_total
        )
        Gauge("motserve_kv_blocks_used", "Blocks of the KV cache in use", registry=registry).set_function(
            lambda: engine.stats.kv_blocks_used
        )
        info = engine.info
        labels = {
            "model": model_name,
            "model_type": info.model_type,
            "device": info.device,
            "dtype": info.dtype,
            "group_size": str(info.group_size),
            "group_fill": info.group_fill,
        }
        Gauge("motserve_model_info", "What is served", list(labels), registry=registry).labels(**labels).set(1)

    def _on_step(self, step: StepStats) -> None:
        self._step_seconds.observe(step.seconds)
        self._prefill_tokens.inc(step.prefill_tokens)
        self._decode_tokens.inc(step.decode_tokens)
        self._groups.inc(step.public_groups)
        self._public_tokens.inc(step.public_tokens)
        self._private_tokens.inc(step.private_tokens)
        self._reused.inc(step.reused_tokens)
        self._swapped.inc(step.swapped_out)
        if step.public_groups:
            self._members.observe(step.public_tokens / step.public_groups)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """One HTTP request is over."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def cut_off(self, cause: str) -> None:
        """A generation ended early: ``disconnect``, ``timeout`` or ``error``."""
        self._cut_off.labels(cause).inc()

    def timer(self) -> RequestTimer:
        """A clock for one generation, started now."""
        return RequestTimer(self)

    def on_delta(self, delta: Delta, since: float | None, gap: float) -> None:
        """A sequence's news, ``gap`` seconds after its last tokens or, where ``since`` is None, after submission."""
        tokens = len(delta.token_ids)
        if tokens:
            self._completion_tokens.inc(tokens)
            if since is None:
                self._first_token.observe(gap)
            else:
                self._token_gap.observe(gap / tokens, tokens)
        if delta.finish_reason is not None:
            self._finished.labels(delta.finish_reason).inc()

    def render(self) -> bytes:
        """The text format of /metrics."""
        return generate_latest(self._registry)


class RequestTimer:
    """Remembers when each sequence of one generation last had a token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def on_deltas(self, deltas: Sequence[Delta]) -> None:
        """News that have come at once."""
        now = time.perf_counter()
        for delta in deltas:
            since = self._last.get(delta.sequence_index)
            self._metrics.on_delta(delta, since, now - (self._start if since is None else since))
            if delta.token_ids:
                self._last[delta.sequence_index] = now


class LoopHistogram(Collector):
    """A histogram that only one thread writes. The client library's locks each of the counts that it adds to, which
    costs too much once a token."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class RequestMetrics:
    """ASGI: counts and times every HTTP request. Paths that are not ours share one label, so that nobody can write
    labels by asking for paths."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499  # nothing was answered: the client had gone

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            self._metrics.request(_endpoint(scope["path"]), status, time.perf_counter() - start)


def _endpoint(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ENDPOINTS else "other"
