"""Continuous batching changes when tokens come, never which: answers equal `model.generate`'s, token for token."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import models
from tests.torch_engine.generation import Bench, Reference, prompt
from tidegate.torch_engine.kv import KvShape

FAMILIES = {
    "llama": models.llama,
    "llama-grouped": lambda: models.llama(hidden=128, heads=4, kv_heads=2, layers=3),
    "qwen2": models.qwen2,
    "qwen2-tied": lambda: models.qwen2(tie=True, heads=4, hidden=128, kv_heads=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_staggered_requests_equal_generate(family: str) -> None:
    model = FAMILIES[family]()
    bench, reference = Bench(model, prefill_tokens_max=16), Reference(model)
    asked = [(prompt(length, length), tokens) for length, tokens in ((5, 20), (40, 9), (1, 30), (70, 5), (23, 12))]
    jobs = []
    for ids, tokens in asked:  # each joins while the earlier ones are somewhere in their answer
        jobs.append(bench.add(ids, max_tokens=tokens))
        bench.loop.step()
        bench.loop.step()
    bench.run()
    for job, (ids, tokens) in zip(jobs, asked, strict=True):
        assert bench.tokens(job) == reference.greedy(ids, tokens)
        assert bench.finish(job) == "length"
    assert bench.idle
    assert set(bench.ended) == set(jobs)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 10), st.integers(0, 4)), min_size=2, max_size=6),
    st.integers(1, 40),
)
def test_alone_or_in_a_batch_the_same_tokens(asked: list[tuple[int, int, int]], chunk: int) -> None:
    """(prompt length, tokens, steps before the next joins); float32."""
    model = models.llama()
    batch = Bench(model, prefill_tokens_max=chunk)
    jobs = []
    for i, (length, tokens, pause) in enumerate(asked):
        jobs.append(batch.add(prompt(length, i), max_tokens=tokens))
        for _ in range(pause):
            if batch.loop.busy():
                batch.loop.step()
    batch.run()
    assert batch.idle
    together = [batch.tokens(job) for job in jobs]
    alone = Bench(model)  # made after: one process has one attention, the last one made
    for i, (length, tokens, _) in enumerate(asked):
        job = alone.add(prompt(length, i), max_tokens=tokens)
        alone.run()
        assert alone.tokens(job) == together[i]


def test_choices_share_the_prefill_and_differ_by_seed() -> None:
    bench = Bench(models.llama())
    job = bench.add(prompt(30, 0), choices=3, temperature=1.0, seed=5)
    bench.run()
    assert bench.loop.prompt_tokens_total == 30
    answers = [bench.tokens(job, i) for i in range(3)]
    assert len({tuple(a) for a in answers}) == 3
    again = bench.add(prompt(30, 0), choices=3, temperature=1.0, seed=5)
    mates = bench.add(prompt(50, 1), temperature=0.8)
    bench.run()
    assert [bench.tokens(again, i) for i in range(3)] == answers
    assert bench.finish(mates) == "length"
    assert bench.idle


def test_greedy_choices_are_equal_and_equal_generate() -> None:
    model = models.llama()
    bench = Bench(model)
    job = bench.add(prompt(9, 0), prompt(20, 1), choices=2)
    bench.run()
    reference = Reference(model)
    for choice, ids in enumerate((prompt(9, 0), prompt(9, 0), prompt(20, 1), prompt(20, 1))):
        assert bench.tokens(job, choice) == reference.greedy(ids, 12)


def test_outgrowing_the_memory_preempts_the_youngest_and_changes_nothing() -> None:
    model = models.llama()
    shape = KvShape(layers=2, kv_heads=1, head_dim=32, dtype=Reference(model).model.dtype)
    weights = sum(p.numel() * p.element_size() for p in Reference(model).model.parameters())
    bench = Bench(model, memory_bytes=weights + shape.row_bytes(160) + 4096, context_tokens_max=160)
    jobs = [bench.add(prompt(40, i), max_tokens=80) for i in range(4)]
    bench.run()
    assert bench.loop.preemptions_total > 0
    reference = Reference(model)
    for i, job in enumerate(jobs):
        assert bench.tokens(job) == reference.greedy(prompt(40, i), 80)
    assert bench.loop.prompt_tokens_total == 160  # a recomputed prompt is not counted twice
    assert bench.idle


def test_the_book_is_never_over_its_bound() -> None:
    model = models.llama()
    bench = Bench(model, memory_bytes=900_000, context_tokens_max=200)
    for i in range(12):
        bench.add(prompt(20 + 7 * i, i), max_tokens=60)
    while bench.loop.busy():
        bench.loop.step()
        assert bench.loop.store.used_bytes <= bench.loop.store.plan.bytes_max
    assert bench.idle


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_an_abort_frees_its_row_at_the_next_step(steps: int) -> None:
    bench = Bench(models.llama(), prefill_tokens_max=16)
    other = bench.add(prompt(10, 1), max_tokens=40)
    job = bench.add(prompt(60, 0), choices=2, max_tokens=100)
    for _ in range(steps):
        bench.loop.step()
    job.aborted = True
    bench.loop.step()
    assert job in bench.ended
    assert bench.loop.store.plan.rows - bench.loop.store.free_rows == 1
    bench.run()
    assert bench.finish(other) == "length"
    assert bench.idle


def test_an_end_token_stops_and_is_counted_but_not_shown() -> None:
    model = models.llama()
    bench = Bench(model)
    free = bench.add(prompt(12, 3), max_tokens=30)
    bench.run()
    answer = bench.tokens(free)
    bench.loop.eos = frozenset({answer[7]})
    cut = answer.index(answer[7])
    job = bench.add(prompt(12, 3), max_tokens=30, ignore_eos=False)
    bench.run()
    assert bench.tokens(job) == answer[: cut + 1]
    assert bench.finish(job) == "stop"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    bench = Bench(models.llama())
    free = bench.add(prompt(12, 4), max_tokens=40)
    bench.run()
    text = bench.text(free)
    stop = text[9:14]  # wherever tokens happen to begin and end
    job = bench.add(prompt(12, 4), max_tokens=40, stops=(stop,))
    bench.run()
    assert bench.text(job) == text[: text.index(stop)]
    assert bench.finish(job) == "stop"
    assert len(bench.tokens(job)) < len(bench.tokens(free))


def test_without_streaming_one_delta_tells_all() -> None:
    bench = Bench(models.llama())
    job = bench.add(prompt(8, 0), streaming=False)
    bench.run()
    assert len(bench.deltas) == 1
    assert len(bench.tokens(job)) == 12


def test_long_prompts_do_not_stall_running_streams() -> None:
    bench = Bench(models.llama(), prefill_tokens_max=16)
    running = bench.add(prompt(4, 0), max_tokens=60)
    bench.loop.step()
    bench.add(prompt(200, 1), max_tokens=1)
    for _ in range(10):
        before = len(bench.tokens(running))
        bench.loop.step()
        assert len(bench.tokens(running)) == before + 1
