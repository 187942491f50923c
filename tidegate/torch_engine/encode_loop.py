"""Embeddings and classification: texts of all waiting requests share padded forwards, oldest first."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.torch_engine.runner import EncoderRunner
from tidegate.torch_engine.worker import Worker

TOKENS_MAX = 4096  # of one forward, padding included


@dataclass(eq=False, slots=True)
class EncodeJob:
    """`vectors[i]` answers `texts[i]`: an embedding or raw logits, float32. `types` are segment ids, for pairs."""

    texts: list[list[int]]
    types: list[list[int]] | None = None
    aborted: bool = False
    vectors: list[list[float]] = field(default_factory=list)
    left: int = 0


class EncodeLoop(Worker[EncodeJob]):
    """Sole owner of the encoder."""

    def __init__(
        self,
        runner: EncoderRunner,
        *,
        deliver: Callable[[list[EncodeJob]], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        super().__init__(on_death)
        self.runner = runner
        self._deliver = deliver
        self._waiting: deque[tuple[EncodeJob, int]] = deque()
        self.running = 0
        self.prompt_tokens_total = 0
        self.completion_tokens_total = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def take(self, job: EncodeJob) -> None:
        job.left = len(job.texts)
        job.vectors = [[] for _ in job.texts]
        self._waiting.extend((job, i) for i in range(len(job.texts)))

    def busy(self) -> bool:
        return bool(self._waiting)

    def step(self) -> None:
        ended: list[EncodeJob] = []
        taken = self._take_texts(ended)
        if taken:
            self.running = len(taken)
            with_types = any(job.types is not None for job, _ in taken)
            types = [job.types[i] if job.types else [0] * len(job.texts[i]) for job, i in taken] if with_types else None
            vectors = self.runner.encode([job.texts[i] for job, i in taken], types).tolist()
            self.running = 0
            for (job, i), vector in zip(taken, vectors, strict=True):
                self.prompt_tokens_total += len(job.texts[i])
                job.vectors[i] = vector
                _count_down(job, ended)
        if ended:
            self._deliver(ended)

    def _take_texts(self, ended: list[EncodeJob]) -> list[tuple[EncodeJob, int]]:
        taken: list[tuple[EncodeJob, int]] = []
        longest = 0
        while self._waiting:
            job, i = self._waiting[0]
            if not job.aborted:
                longest = max(longest, len(job.texts[i]))
                if taken and longest * (len(taken) + 1) > TOKENS_MAX:
                    break
                taken.append((job, i))
            else:
                _count_down(job, ended)
            self._waiting.popleft()
        return taken


def _count_down(job: EncodeJob, ended: list[EncodeJob]) -> None:
    job.left -= 1
    if job.left == 0:
        ended.append(job)
