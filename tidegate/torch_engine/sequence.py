"""One answer being generated, and the job it belongs to. Owner: the step loop's thread."""

from dataclasses import dataclass, field
from typing import Literal

from tidegate.torch_engine.adapter import Adapter
from tidegate.torch_engine.sampler import SamplerState, SamplingParams, TokenLogprobs, state
from tidegate.torch_engine.stops import StopMatcher
from tidegate.torch_engine.text import TextCodec, TextStream

FinishReason = Literal["stop", "length"]


@dataclass(eq=False, slots=True)
class GenerationJob:
    """One request: `prompts` times `choices` answers. `streaming` asks for a delta a step instead of one at the end.

    `aborted` is set by the server's thread and only ever goes from False to True.
    """

    prompts: list[list[int]]
    choices: int
    params: SamplingParams
    streaming: bool
    adapter: Adapter | None = None
    aborted: bool = False
    sequences_left: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with the text it released (often none, sometimes more than its own)."""

    id: int
    text: str
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Delta:
    """What happened to one choice: one token when streaming, all of them at its end when not."""

    job: GenerationJob
    choice: int
    tokens: tuple[Token, ...]
    finish: FinishReason | None


@dataclass(eq=False, slots=True)
class Sequence:
    """`computed` tokens of `tokens` (prompt and answer so far) have their K and V in `row`; `booked` are paid for."""

    job: GenerationJob
    choice: int
    prompt_length: int
    tokens: list[int]
    sampler: SamplerState
    text: TextStream
    stops: StopMatcher
    row: int = -1
    computed: int = 0
    booked: int = 0
    followers: list["Sequence"] = field(default_factory=list)
    kept: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Its next step is one token long; anything longer is prefill (also after a preemption)."""
        return self.computed > 0 and self.pending == 1 and not self.followers

    def accept(self, token: int, logprobs: TokenLogprobs | None, eos: frozenset[int]) -> Delta | None:
        """Takes the sampled token; a Delta if the job is to be told now."""
        self.tokens.append(token)
        params = self.sampler.params
        if token in eos and not params.ignore_eos:
            text, self.finish = self.stops.flush(), "stop"
        else:
            text, stopped = self.stops.push(self.text.push(token))
            if stopped:
                self.finish = "stop"
            elif len(self.tokens) - self.prompt_length >= params.max_tokens:
                text, self.finish = text + self.stops.flush(), "length"
        told = Token(token, text, logprobs)
        if self.job.streaming:
            return Delta(self.job, self.choice, (told,), self.finish)
        self.kept.append(told)
        return Delta(self.job, self.choice, tuple(self.kept), self.finish) if self.finish else None


def groups(job: GenerationJob, codec: TextCodec) -> list[list[Sequence]]:
    """The job's sequences, one group a prompt: the first of it prefills, the others take over a copy of its row."""
    made: list[list[Sequence]] = []
    for p, prompt in enumerate(job.prompts):
        group = [
            Sequence(
                job=job,
                choice=p * job.choices + i,
                prompt_length=len(prompt),
                tokens=list(prompt),
                sampler=state(job.params, p * job.choices + i),
                text=TextStream(codec, prompt),
                stops=StopMatcher(job.params.stops),
            )
            for i in range(job.choices)
        ]
        group[0].followers = group[1:]
        made.append(group)
    job.sequences_left = len(job.prompts) * job.choices
    return made
