"""Drives a step loop by hand, one step at a time and on this thread, beside `model.generate` as the reference."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tidegate.torch_engine.model import load
from tidegate.torch_engine.options import Options
from tidegate.torch_engine.runner import GenerativeRunner
from tidegate.torch_engine.sampler import SamplingParams
from tidegate.torch_engine.sequence import Delta, GenerationJob
from tidegate.torch_engine.step_loop import StepLoop


class Bench:
    """One model on the bench: `add` requests whenever you like, `step`, look at `answers`."""

    def __init__(self, model: Path, *, prefill_tokens_max: int = 128, **options: Any) -> None:
        self.loaded = load(Options(model=model, socket="", threads=1, **options))
        assert isinstance(self.loaded.runner, GenerativeRunner)
        self.deltas: list[Delta] = []
        self.ended: list[GenerationJob] = []
        self.loop = StepLoop(
            self.loaded.runner,
            self.loaded.codec,
            eos=self.loaded.eos,
            prefill_tokens_max=prefill_tokens_max,
            deliver=self._deliver,
            on_death=self._died,
        )

    def _deliver(self, deltas: list[Delta], ended: list[GenerationJob]) -> None:
        self.deltas += deltas
        self.ended += ended

    def _died(self, error: BaseException) -> None:
        raise error

    def add(
        self, *prompts: list[int], choices: int = 1, streaming: bool = True, max_tokens: int = 12, **given: Any
    ) -> GenerationJob:
        params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0, "ignore_eos": True} | given))
        job = GenerationJob([list(p) for p in prompts], choices, params, streaming)
        self.loop.take(job)
        return job

    def run(self, steps_max: int = 2_000) -> None:
        for _ in range(steps_max):
            if not self.loop.busy():
                return
            self.loop.step()
        raise AssertionError("the step loop does not come to an end")

    def tokens(self, job: GenerationJob, choice: int = 0) -> list[int]:
        return [t.id for d in self.deltas if d.job is job and d.choice == choice for t in d.tokens]

    def text(self, job: GenerationJob, choice: int = 0) -> str:
        return "".join(t.text for d in self.deltas if d.job is job and d.choice == choice for t in d.tokens)

    def finish(self, job: GenerationJob, choice: int = 0) -> str | None:
        return next((d.finish for d in self.deltas if d.job is job and d.choice == choice and d.finish), None)

    @property
    def idle(self) -> bool:
        """Every row is back and nothing is booked."""
        store = self.loop.store
        return store.free_rows == store.plan.rows and store.used_bytes == 0


class Reference:
    """transformers' own `generate`, greedy, one prompt at a time."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out[0, len(prompt) :].tolist()


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that are no special tokens of `tests.models`."""
    return torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
