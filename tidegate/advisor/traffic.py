"""Traffic as the advisor holds it: one numpy column a quantity, sorted by time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

HOUR_MS = 3_600_000.0
DAY_MS = 24 * HOUR_MS
MONTH_HOURS = 730.0
WEEK_MS = 7 * DAY_MS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Requests of one or more endpoints.

    `t_ms` are instants in ms from the start, ascending. `cached` is the part of `inputs` found in a prefix cache.
    `service_ms` is given for work that takes a fixed time instead of tokens (all zero otherwise). `start_ms` is the
    epoch instant of `t_ms` = 0 in the asked time zone's local time, None where the trace is relative: then t = 0 counts
    as midnight of an unknown weekday. `span_ms` is how long the traffic was watched, at least up to the last request.
    """

    name: str
    t_ms: Floats
    inputs: Ints
    cached: Ints
    outputs: Ints
    service_ms: Floats
    endpoint_of: NDArray[np.int32]
    endpoints: tuple[str, ...]
    span_ms: float
    start_ms: float | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.t_ms)

    @property
    def fixed_time(self) -> bool:
        return bool(self.service_ms.any())

    @property
    def months(self) -> float:
        """How many months of 730 hours the span is: a cost over the span ÷ this = a monthly cost."""
        return self.span_ms / HOUR_MS / MONTH_HOURS

    def chosen(self, mask: NDArray[np.bool_], name: str | None = None) -> "Traffic":
        """The requests of `mask`; the span stays, an endpoint's silence before and after is part of its traffic."""
        return replace(
            self,
            name=name or self.name,
            t_ms=self.t_ms[mask],
            inputs=self.inputs[mask],
            cached=self.cached[mask],
            outputs=self.outputs[mask],
            service_ms=self.service_ms[mask],
            endpoint_of=self.endpoint_of[mask],
        )

    def apart(self) -> Iterator["Traffic"]:
        """One Traffic an endpoint: every endpoint is a model of its own."""
        for number, endpoint in enumerate(self.endpoints):
            part = self.chosen(self.endpoint_of == number, endpoint)
            if len(part):
                yield replace(part, endpoint_of=np.zeros(len(part), np.int32), endpoints=(endpoint,))

    def scaled(self, factor: float) -> "Traffic":
        """The same shape with `factor` times the requests: whole copies shifted by a little, and a thinned last one.

        Copies are shifted by a golden-ratio share of a minute, so that bursts stay bursts and instants do not coincide.
        """
        whole, rest = int(factor), factor - int(factor)
        keep = (np.arange(len(self)) * 0.6180339887498949) % 1.0 < rest
        pieces = [np.arange(len(self))] * whole + [np.flatnonzero(keep)]
        shifts = [np.full(len(p), (k * 0.6180339887498949) % 1.0 * 60_000.0) for k, p in enumerate(pieces)]
        index = np.concatenate(pieces).astype(np.int64)
        t_ms = np.minimum(self.t_ms[index] + np.concatenate(shifts), self.span_ms)
        order = np.argsort(t_ms, kind="stable")
        moved = index[order]
        return replace(
            self,
            t_ms=t_ms[order],
            inputs=self.inputs[moved],
            cached=self.cached[moved],
            outputs=self.outputs[moved],
            service_ms=self.service_ms[moved],
            endpoint_of=self.endpoint_of[moved],
        )
