"""Continuous batching: every step decodes all running sequences and prefills a piece of those that join.

A joining prompt travels in the same forward as the running streams, at most `prefill_tokens_max` of it a step, so a
long prompt never stalls them for long. Memory: a sequence is admitted when its prompt fits the book of the KV store;
when running ones outgrow it, the youngest gives its row back and is recomputed later (its text so far is kept).
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items

from tidegate.torch_engine.adapter import Adapter
from tidegate.torch_engine.attention import Chunk, FlatBatch
from tidegate.torch_engine.runner import GenerativeRunner
from tidegate.torch_engine.sampler import sample
from tidegate.torch_engine.sequence import Delta, GenerationJob, Sequence, groups
from tidegate.torch_engine.text import TextCodec
from tidegate.torch_engine.worker import Worker

PREFILL_TOKENS_ALONE_MAX = 1024  # nobody is decoding: only activations bound a chunk

Deliver = Callable[[list[Delta], list[GenerationJob]], None]


class StepLoop(Worker[GenerationJob]):
    """Sole owner of all sequences and of the KV store."""

    def __init__(
        self,
        runner: GenerativeRunner,
        codec: TextCodec,
        *,
        eos: frozenset[int],
        prefill_tokens_max: int,
        deliver: Deliver,
        on_death: Callable[[BaseException], None],
    ) -> None:
        super().__init__(on_death)
        self.runner = runner
        self.store = runner.store
        self.codec = codec
        self.eos = eos
        self.prefill_tokens_max = prefill_tokens_max
        self._deliver = deliver
        self._waiting: deque[list[Sequence]] = deque()
        self._running: list[Sequence] = []  # in order of admission, oldest first
        self._ended: list[GenerationJob] = []
        self.running = 0  # these numbers are read by the server's thread
        self.waiting = 0
        self.prompt_tokens_total = 0
        self.completion_tokens_total = 0
        self.preemptions_total = 0

    def take(self, job: GenerationJob) -> None:
        self._waiting.extend(groups(job, self.codec))
        self._count()

    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> None:
        self._drop_aborted()
        self._admit()
        self._make_room()
        deltas = self._forward() if self._running else []
        self._count()
        ended, self._ended = self._ended, []
        if deltas or ended:
            self._deliver(deltas, ended)

    def _count(self) -> None:
        self.running = sum(1 + len(s.followers) for s in self._running)
        self.waiting = sum(map(len, self._waiting))

    # ---- who is in --------------------------------------------------------------------------------------------------

    def _drop_aborted(self) -> None:
        for sequence in [s for s in self._running if s.job.aborted]:
            self._leave(sequence)
        for group in [g for g in self._waiting if g[0].job.aborted]:
            self._waiting.remove(group)
            for sequence in group:
                self._end(sequence)

    def _admit(self) -> None:
        """First come, first served: a group that does not fit yet holds back those behind it, so none starves."""
        while self._waiting:
            group = self._waiting[0]
            length = len(group[0].tokens)
            if self.store.free_rows < len(group):
                return
            if self._running and not self.store.fits(len(group) * self.store.shape.row_bytes(length + 1)):
                return
            self._waiting.popleft()
            for sequence in group:
                sequence.row = self.store.take()
                sequence.booked = length
                self.store.grow(0, length)
            self._running.append(group[0])
            if not group[0].tokens[group[0].prompt_length :]:
                self.prompt_tokens_total += length

    def _make_room(self) -> None:
        """Books the token each decoding sequence is about to add; the youngest leave until the rest fits."""
        while True:
            growing = [s for s in self._running if s.decoding and s.computed + 1 > s.booked]
            shape = self.store.shape
            need = sum(shape.row_bytes(s.computed + 1) - shape.row_bytes(s.booked) for s in growing)
            if self.store.fits(need) or len(self._running) == 1:
                break
            self._preempt(self._running.pop())
        for sequence in growing:
            self.store.grow(sequence.booked, sequence.computed + 1)
            sequence.booked = sequence.computed + 1

    def _preempt(self, sequence: Sequence) -> None:
        group = [sequence, *sequence.followers]
        for member in group:
            self.store.release(member.row, member.booked)
            member.row, member.computed, member.booked = -1, 0, 0
        self._waiting.appendleft(group)
        self.preemptions_total += 1

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        for member in (sequence, *sequence.followers):
            self.store.release(member.row, member.booked)
            self._end(member)

    def _end(self, sequence: Sequence) -> None:
        sequence.job.sequences_left -= 1
        if sequence.job.sequences_left == 0:
            self._ended.append(sequence.job)

    # ---- one forward ------------------------------------------------------------------------------------------------

    def _forward(self) -> list[Delta]:
        decoding = [s for s in self._running if s.decoding]
        tokens = [s.tokens[-1] for s in decoding]
        chunks, prefilled = self._chunks(len(tokens), self.prefill_tokens_max if decoding else PREFILL_TOKENS_ALONE_MAX)
        for sequence, chunk in prefilled:
            tokens += sequence.tokens[chunk.start : chunk.start + chunk.length]
        places = list(range(len(decoding)))
        sampled = list(decoding)
        for sequence, chunk in prefilled:
            if chunk.start + chunk.length == len(sequence.tokens):
                heirs = [sequence, *sequence.followers]
                sampled += heirs
                places += [chunk.offset + chunk.length - 1] * len(heirs)
        batch = FlatBatch([s.row for s in decoding], [s.computed for s in decoding], chunks)
        logits = self.runner.step(tokens, batch, places, self._adapters(decoding, prefilled))
        for sequence in decoding:
            sequence.computed += 1
        for sequence, chunk in prefilled:
            sequence.computed += chunk.length
            if not sequence.pending:
                self._fork(sequence)
        return self._sample(logits, sampled) if sampled else []

    def _adapters(self, decoding: Items[Sequence], prefilled: Items[tuple[Sequence, Chunk]]) -> list[Adapter | None]:
        """By token of the batch; nothing where this engine takes no adapters."""
        if self.runner.lora is None:
            return []
        wanted = [s.job.adapter for s in decoding]
        for sequence, chunk in prefilled:
            wanted += [sequence.job.adapter] * chunk.length
        return wanted

    def _chunks(self, offset: int, budget: int) -> tuple[list[Chunk], list[tuple[Sequence, Chunk]]]:
        prefilled: list[tuple[Sequence, Chunk]] = []
        for sequence in self._running:
            if sequence.decoding or budget == 0:
                continue
            length = min(sequence.pending, budget)
            prefilled.append((sequence, Chunk(sequence.row, sequence.computed, length, offset)))
            offset, budget = offset + length, budget - length
        return [chunk for _, chunk in prefilled], prefilled

    def _fork(self, sequence: Sequence) -> None:
        """The prompt is computed once; the other choices take over a copy of its row."""
        for follower in sequence.followers:
            self.store.copy_row(sequence.row, follower.row, sequence.computed)
            follower.computed = sequence.computed
            self._running.append(follower)
        sequence.followers = []

    def _sample(self, logits: object, sampled: Items[Sequence]) -> list[Delta]:
        deltas = []
        for sequence, (token, logprobs) in zip(
            sampled,
            sample(logits, [s.sampler for s in sampled]),  # type: ignore[arg-type]
            strict=True,
        ):
            delta = sequence.accept(token, logprobs, self.eos)
            if delta is not None:
                deltas.append(delta)
            if sequence.finish:
                self._leave(sequence)
        self.completion_tokens_total += len(sampled)
        return deltas
