"""What Prometheus is told: the requests and predictions of this process, and the numbers of the database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hpo.service.backend import Backend
from hpo.storage.errors import PostgresError
from hpo.storage.metrics import Numbers, read_numbers

MEDIA_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds

OWN = CollectorRegistry()  # of this process
ProcessCollector(registry=OWN)
PlatformCollector(registry=OWN)
REQUESTS = Histogram(
    "hpo_http_request_seconds",
    "Time until an answer began, by the route's template.",
    ("method", "route", "status"),
    buckets=BUCKETS,
    registry=OWN,
)
IN_FLIGHT = Gauge("hpo_http_requests_in_flight", "Requests that are being answered.", registry=OWN)
PREDICTIONS = Histogram(
    "hpo_prediction_seconds", "Time of a call of a model, for one request or several.", buckets=BUCKETS, registry=OWN
)
SEQUENCES = Histogram(
    "hpo_prediction_sequences",
    "Sequences of a call of a model.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384),
    registry=OWN,
)


@contextmanager
def predicting(sequences: int) -> Iterator[None]:
    """The block is a call of a model on so many sequences."""
    SEQUENCES.observe(sequences)
    with PREDICTIONS.time():
        yield


def metrics_of(backend: Backend) -> bytes:
    """The metrics in Prometheus' text format. Without a database, those of the process and that it is away."""
    registry = CollectorRegistry()
    try:
        with backend.database() as database:
            registry.register(_OfDatabase(read_numbers(database.storage.connection)))
    except PostgresError:
        registry.register(_OfDatabase(None))
    return generate_latest(registry) + generate_latest(OWN)


class _OfDatabase(Collector):
    def __init__(self, numbers: Numbers | None) -> None:
        """None: the database is away."""
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        found = self._numbers
        yield _gauge("hpo_database_up", "Whether the database answers.", float(found is not None))
        if found is None:
            return
        yield _by_state("hpo_studies", "Studies by status.", "status", found.studies)
        yield _by_state("hpo_trials", "Trials by state.", "state", found.trials)
        yield _gauge("hpo_trials_held", "Trials under a lease that has not ended.", found.held)
        yield _gauge("hpo_trials_queued", "Trials that open studies may still begin.", found.queued)
        yield _gauge("hpo_workers_alive", "Workers that were heard of in the time of a lease.", found.workers)
        yield _by_state("hpo_notices", "Notices to the addresses of studies, by state.", "state", found.notices)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _by_state(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for state, count in counts.items():
        family.add_metric((state,), count)
    return family
