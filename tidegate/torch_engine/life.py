"""The life of one engine: loading, ready, asleep, failed; and who may come in. Owner: the server's thread.

Admission and the gate of `sleep` read and write the same variables on the same thread, so no request can slip between
"nothing is running" and "asleep".
"""

import asyncio
import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal

from tidegate.domain.errors import Refusal
from tidegate.torch_engine import memory
from tidegate.torch_engine.answers import Answer
from tidegate.torch_engine.encode_loop import EncodeJob, EncodeLoop
from tidegate.torch_engine.faults import EXIT_BUG, EXIT_OK, EngineError
from tidegate.torch_engine.model import Loaded, load
from tidegate.torch_engine.options import Options
from tidegate.torch_engine.runner import EncoderRunner, GenerativeRunner
from tidegate.torch_engine.sequence import Delta, GenerationJob
from tidegate.torch_engine.step_loop import StepLoop

State = Literal["loading", "ready", "asleep", "failed"]
FAILED_LINGER_MS = 2_000  # how long a failed engine still answers `/control/state` before it exits
log = logging.getLogger("tidegate.engine")


class NotServing(Exception):
    """A 503 with a code of the engine's own: `asleep`, `draining`. The gateway holds the request again."""

    def __init__(self, code: str, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms


class Life:
    """State, the worker, and the requests in flight (`live`)."""

    def __init__(self, options: Options, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.loop = loop
        self.state: State = "loading"
        self.reason = ""
        self.draining = False
        self.exit_code = EXIT_OK
        self.ended = asyncio.Event()
        self._settled = asyncio.Event()  # ready, or failed for good
        self.model: Loaded | None = None
        self.worker: StepLoop | EncodeLoop | None = None
        self._live: dict[GenerationJob | EncodeJob, Any] = {}
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._control = asyncio.Lock()  # sleep, wake and canary never overlap

    # ---- loading ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def _load(self) -> None:
        try:
            loaded = load(self.options)
        except EngineError as error:
            self.loop.call_soon_threadsafe(self._fail, error.reason, error.exit_code)
        except BaseException as error:  # noqa: BLE001  a bug of ours: reported, then the process ends
            self._on_death(error)
        else:
            self.loop.call_soon_threadsafe(self._ready, loaded)

    def _ready(self, loaded: Loaded) -> None:
        gc.freeze()  # what is alive now stays: collecting before a sleep must not walk all of torch and transformers
        self.model = loaded
        if isinstance(loaded.runner, EncoderRunner):
            self.worker = EncodeLoop(loaded.runner, deliver=self._encoded_threadsafe, on_death=self._on_death)
        else:
            self.worker = StepLoop(
                loaded.runner,
                loaded.codec,
                eos=loaded.eos,
                prefill_tokens_max=self.options.prefill_tokens_max,
                deliver=self._generated_threadsafe,
                on_death=self._on_death,
            )
        self.worker.start()
        self.state = "ready"
        self._settled.set()
        log.info("ready: %s, %d weight bytes", loaded.kind, loaded.weight_bytes)

    def _fail(self, reason: str, exit_code: int) -> None:
        self.state, self.reason, self.exit_code = "failed", reason, exit_code
        self._settled.set()
        log.error("failed: %s", reason)
        self.loop.call_later(FAILED_LINGER_MS / 1000, self.ended.set)

    def _on_death(self, error: BaseException) -> None:
        """On any thread. The frames are logged (they hold no data), the error's own text is not (it may)."""
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.critical("bug: %s\n%s", type(error).__name__, frames)
        self.loop.call_soon_threadsafe(self._die)

    def _die(self) -> None:
        self.state, self.reason, self.exit_code = "failed", "the engine has a bug; its log says where", EXIT_BUG
        self._settled.set()
        self.ended.set()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def check_serving(self) -> Loaded:
        """The model, if a request may come in now. Raises NotServing or Refusal."""
        if self.state == "asleep":
            raise NotServing("asleep", "this replica is asleep", 1_000)
        if self.state == "loading":
            raise Refusal("not_ready", "this replica is loading its model", retry_after_ms=1_000)
        if self.state == "failed" or self.model is None:
            raise Refusal("endpoint_failed", self.reason or "this replica failed")
        if self.draining:
            raise NotServing("draining", "this replica takes no new requests", 1_000)
        if len(self._live) >= self.options.waiting_requests_max + self.model.slots:
            raise Refusal("capacity", "this replica's waiting room is full", retry_after_ms=1_000)
        return self.model

    def submit(self, job: GenerationJob | EncodeJob, answer: Any) -> None:
        """`answer` is an `Answer` for a GenerationJob, a callable of the finished job for an EncodeJob."""
        assert self.worker is not None
        self._live[job] = answer
        self._quiet.clear()
        self.worker.submit(job)  # type: ignore[arg-type]

    def give_back(self, job: GenerationJob | EncodeJob) -> None:
        """A job that ended, or never began, needs its adapter no more."""
        adapter = job.adapter if isinstance(job, GenerationJob) else None
        if adapter is not None and self.model is not None and self.model.lora is not None:
            self.model.lora.give_back(adapter)

    def abort(self, job: GenerationJob | EncodeJob) -> None:
        job.aborted = True
        if self.worker is not None:
            self.worker.nudge()

    def _generated_threadsafe(self, deltas: list[Delta], ended: list[GenerationJob]) -> None:
        """One hand-over a step, however many streams run."""
        self.loop.call_soon_threadsafe(self._generated, deltas, ended)

    def _generated(self, deltas: list[Delta], ended: list[GenerationJob]) -> None:
        for delta in deltas:
            answer: Answer = self._live[delta.job]
            if not delta.job.aborted:
                answer.on_delta(delta)
        for job in ended:
            answer = self._live.pop(job)
            answer.on_end()
            self.give_back(job)
        self._note_quiet()

    def _encoded_threadsafe(self, ended: list[EncodeJob]) -> None:
        self.loop.call_soon_threadsafe(self._encoded, ended)

    def _encoded(self, ended: list[EncodeJob]) -> None:
        for job in ended:
            finish: Callable[[EncodeJob], None] = self._live.pop(job)
            if not job.aborted:
                finish(job)
        self._note_quiet()

    def _note_quiet(self) -> None:
        if not self._live:
            self._quiet.set()

    # ---- control ----------------------------------------------------------------------------------------------------

    async def drain(self) -> dict[str, Any]:
        self.draining = True
        await self._quiet.wait()
        return {"running": 0, "waiting": 0}

    def resume(self) -> dict[str, Any]:
        self.draining = False
        return {"state": self.state}

    async def sleep(self) -> dict[str, Any]:
        """Refusal(conflict) while anything runs or waits. The answer's bytes are measured before and after."""
        async with self._control:
            model = self._require_model()
            if self._live:
                raise Refusal("conflict", f"{len(self._live)} requests are in flight: drain first")
            begun, before = time.perf_counter(), memory.process_bytes()
            if self.state == "ready":
                self.state = "asleep"
                await self._errand(model.sleep)
            after = memory.process_bytes()
            held = await self._errand(model.residency.accelerator_bytes)
            return {
                "freed_bytes": max(0, before - after),
                "accelerator_bytes": held,
                "sleep_ms": _ms_since(begun),
            }

    async def wake(self) -> dict[str, Any]:
        async with self._control:
            model = self._require_model()
            begun = time.perf_counter()
            if self.state == "asleep":
                try:
                    await self._errand(model.residency.wake)
                except EngineError as error:
                    self._fail(error.reason, error.exit_code)
                    raise Refusal("endpoint_failed", error.reason) from error
                self.state = "ready"
            self.draining = False
            return {"wake_ms": _ms_since(begun)}

    async def canary(self) -> dict[str, Any]:
        async with self._control:
            model = self._require_model()
            if self.state != "ready":
                raise Refusal("conflict", f"this replica is {self.state}")
            runner = model.runner
            if isinstance(runner, GenerativeRunner) and not runner.store.free_rows:
                raise Refusal("conflict", "every slot is busy")
            return {"tokens": await self._errand(model.canary)}

    async def settled(self) -> dict[str, Any]:
        """`/control/ready`: answers when the model is loaded, or never will be. Nothing is measured for it: whoever
        starts an engine waits here, and the loader needs the CPU.
        """
        await self._settled.wait()
        return {"state": self.state, "reason": self.reason}

    async def describe(self) -> dict[str, Any]:
        """`/control/state`."""
        model, worker = self.model, self.worker
        told: dict[str, Any] = {"state": self.state, "reason": self.reason, "draining": self.draining}
        # Never through the worker: a long step must not make the engine look dead.
        held = await self.loop.run_in_executor(None, model.residency.accelerator_bytes) if model is not None else 0
        told |= {
            "live": len(self._live),
            "running": worker.running if worker is not None else 0,
            "waiting": worker.waiting if worker is not None else 0,
            "accelerator_bytes": held,
            "prompt_tokens_total": worker.prompt_tokens_total if worker is not None else 0,
            "completion_tokens_total": worker.completion_tokens_total if worker is not None else 0,
        }
        if model is not None:
            told |= {
                "kind": model.kind,
                "slots": model.slots,
                "weight_bytes": model.weight_bytes,
                "context_tokens_max": model.context_tokens_max,
            }
        return told

    def _require_model(self) -> Loaded:
        if self.model is None or self.state == "failed":
            raise Refusal("conflict", f"this replica is {self.state}")
        return self.model

    async def _errand(self, act: Callable[[], Any]) -> Any:
        assert self.worker is not None
        return await asyncio.wrap_future(self.worker.errand(act))


def _ms_since(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1000, 3)
