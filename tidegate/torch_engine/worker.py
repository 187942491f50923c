"""The thread that owns a model: takes jobs and errands between steps, steps while there is work, sleeps otherwise.

Everything crosses this line at two points only: `submit`/`errand` going in, one `deliver` call a step coming out.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Worker(Generic[J]):
    """Subclasses own the model and implement the four hooks; each runs on this thread only."""

    def __init__(self, on_death: Callable[[BaseException], None]) -> None:
        self._wake = threading.Condition()
        self._jobs: list[J] = []  # bounded by the server's `waiting_requests_max`
        self._errands: list[tuple[Callable[[], Any], Future[Any]]] = []  # control calls, one at a time each
        self._stopping = False
        self._on_death = on_death
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: J) -> None:
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    def nudge(self) -> None:
        """Something outside changed (a job was aborted): look again."""
        with self._wake:
            self._wake.notify()

    def errand(self, act: Callable[[], R]) -> "Future[R]":
        """Runs `act` on this thread between two steps."""
        future: Future[R] = Future()
        with self._wake:
            self._errands.append((act, future))
            self._wake.notify()
        return future

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                continue
        except BaseException as error:  # noqa: BLE001  a bug: nothing of this process can be trusted any more
            self._on_death(error)

    def _turn(self) -> bool:
        with self._wake:
            while not (self._jobs or self._errands or self._stopping or self.busy()):
                self._wake.wait()
            if self._stopping:
                return False
            jobs, self._jobs = self._jobs, []
            errands, self._errands = self._errands, []
        for job in jobs:
            self.take(job)
        for act, future in errands:
            try:
                future.set_result(act())
            except Exception as error:  # noqa: BLE001  handed to whoever asked, who raises it again
                future.set_exception(error)
        if self.busy():
            self.step()
        return True

    def take(self, job: J) -> None:
        """A job arrives."""
        raise AssertionError("a worker takes jobs")

    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        raise AssertionError("a worker knows whether it is busy")

    def step(self) -> None:
        """One forward and what follows from it."""
        raise AssertionError("a worker steps")
