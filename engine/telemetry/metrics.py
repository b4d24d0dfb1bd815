"""Prometheus metrics, under vLLM's names where the meaning is the same, under ``slipstream:`` elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.contracts import Status, TraceRecord

TTFT_S = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
E2E_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
Gauges = Callable[[], Mapping[str, float]]


class Metrics:
    """Metrics of one server, in a registry of their own. ``gauges`` is read at every scrape."""

    def __init__(self, model: str, gauges: Gauges) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        base = ("model_name",)
        arm = (*base, "policy_version", "arm")

        def counter(name: str, text: str, labels: tuple[str, ...] = base) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, base, buckets=buckets, registry=self.registry)

        self._success = counter("vllm:request_success", "Requests that ended well.", (*base, "finished_reason"))
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens computed.")
        self._output = counter("vllm:generation_tokens", "Tokens generated.")
        self._steps = counter("vllm:spec_decode_num_drafts", "Verify steps.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._per_pos = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted by position in the draft.", (*base, "position")
        )
        self._ttft = seconds("vllm:time_to_first_token_seconds", "Time to first token.", TTFT_S)
        self._tpot = seconds("vllm:request_time_per_output_token_seconds", "Mean time per output token.", TPOT_S)
        self._e2e = seconds("vllm:e2e_request_latency_seconds", "End-to-end latency.", E2E_S)
        self._queue = seconds("vllm:request_queue_time_seconds", "Time in the queue.", E2E_S)
        self._requests = counter("slipstream:requests", "Requests by policy version, arm and status.", (*arm, "status"))
        self._drafting = counter("slipstream:draft_seconds", "Time of own proposals.", arm)
        self._cost = counter("slipstream:cost_seconds", "Decoding time by what each request cost of it.", arm)
        self._plain = counter("slipstream:plain_seconds", "What plain decoding of the same would have cost.", arm)
        self._expected = counter("slipstream:expected_accepted", "Accepted tokens that K control expected.", arm)
        self._expected_plain = counter(
            "slipstream:expected_plain_seconds", "What plain decoding of what K control expected would have cost.", arm
        )
        self._expected_cost = counter("slipstream:expected_cost_seconds", "Decoding time that K control expected.", arm)
        self.registry.register(_Gauges(model, gauges))

    def observe(self, record: TraceRecord) -> None:
        """Count one finished request."""
        model = self._model
        self._requests.labels(model, str(record.policy_version), record.arm, record.status.value).inc()
        if record.status is Status.OK:
            self._success.labels(model, record.finish_reason or "").inc()
        for counter, amount in (
            (self._drafting, record.draft_s),
            (self._cost, record.cost_s),
            (self._plain, record.plain_s),
            (self._expected, record.expected_accepted),
            (self._expected_plain, record.expected_plain_s),
            (self._expected_cost, record.expected_cost_s),
        ):
            counter.labels(model, str(record.policy_version), record.arm).inc(amount)
        for counter, n in (
            (self._prompt, record.prompt_tokens),
            (self._output, record.output_tokens),
            (self._steps, record.steps),
            (self._drafted, record.drafted),
            (self._accepted, record.accepted),
        ):
            counter.labels(model).inc(n)
        for position, n in enumerate(record.accepted_per_pos):
            self._per_pos.labels(model, str(position)).inc(n)
        for histogram, value in (
            (self._ttft, record.ttft_s),
            (self._tpot, record.tpot_s),
            (self._queue, record.queue_s),
            (self._e2e, record.e2e_s if record.status is Status.OK else None),
        ):
            if value is not None:
                histogram.labels(model).observe(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, model: str, gauges: Gauges) -> None:
        self._model, self._gauges = model, gauges

    def collect(self) -> Iterable[Any]:
        for name, value in self._gauges().items():
            family = GaugeMetricFamily(name, name.split(":", 1)[-1].replace("_", " "), labels=("model_name",))
            family.add_metric([self._model], value)
            yield family
