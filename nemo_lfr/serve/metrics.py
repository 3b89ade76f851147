"""Metrics of a server, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nemo_lfr.serve.engine import Engine, Step
from nemo_lfr.serve.session import Session

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Metrics of one engine. Each instance has its own registry, so a process may have several engines."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._live = Gauge("nemo_lfr_streams", "Live streams and posted files that are open.", registry=registry)
        self._frames = Counter("nemo_lfr_frames", "Frames that were encoded or decoded.", ["kind"], registry=registry)
        self._batch = Histogram(
            "nemo_lfr_batch_streams",
            "Streams in a step of the engine.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self._step = Histogram(
            "nemo_lfr_step_seconds", "Duration of a step of the engine.", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "nemo_lfr_first_result_seconds",
            "Time from a stream's first input to its first result.",
            ["kind"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._closed = Counter(
            "nemo_lfr_streams_closed", "Closed streams by WebSocket close code.", ["kind", "code"], registry=registry
        )

    def watch(self, engine: Engine) -> None:
        """Include the number of an engine's open sessions (live streams and files) in the metrics."""
        self._live.set_function(lambda: len(engine))

    def on_step(self, step: Step) -> None:
        """Record the frames, batch size and duration of an engine's step."""
        self._frames.labels(step.kind).inc(step.num_frames)
        self._batch.observe(step.num_streams)
        self._step.observe(step.seconds)

    def on_close(self, session: Session | None, kind: str, code: int) -> None:
        """Record the end of a WebSocket stream.

        Args:
            session: session of the stream; None if the stream was refused.
            kind: "encode" or "decode".
            code: WebSocket close code.
        """
        self._closed.labels(kind, str(int(code))).inc()  # str() of an IntEnum is its name in Python 3.10
        if session is not None and session.first_result_s is not None:
            self._first.labels(kind).observe(session.first_result_s)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)
