"""Sampling against its definition: distributions, truncation, penalties, seeds, logprobs."""

import math

import pytest
import torch

from tidegate.torch_engine.sampler import SamplingParams, sample, state


def params(**given: object) -> SamplingParams:
    return SamplingParams(max_tokens=8, **given)  # type: ignore[arg-type]


def draws(logits: torch.Tensor, count: int, **given: object) -> list[int]:
    s = state(params(seed=1, **given), 0)
    return [sample(logits[None], [s])[0][0] for _ in range(count)]


def test_greedy_is_argmax_row_by_row() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    got = [token for token, _ in sample(logits, [state(params(temperature=0), i) for i in range(5)])]
    assert got == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    wanted = (logits / temperature).softmax(-1)
    got = torch.bincount(torch.tensor(draws(logits, 4000, temperature=temperature)), minlength=4) / 4000
    assert (got - wanted).abs().max() < 0.03  # 4 standard deviations of 4000 draws


def test_top_k_and_top_p_keep_exactly_the_head() -> None:
    logits = torch.tensor([3.0, 2.9, 2.8, 0.0, -1.0])
    assert set(draws(logits, 300, top_k=2)) == {0, 1}
    assert set(draws(logits, 50, top_k=1)) == {0}
    assert set(draws(logits, 50, top_p=0.01)) == {0}
    mass = logits.softmax(-1)
    assert set(draws(logits, 300, top_p=float(mass[0] + mass[1]) - 1e-4)) == {0, 1}
    assert set(draws(logits, 300, top_p=float(mass[0] + mass[1]) + 1e-2)) == {0, 1, 2}
    assert set(draws(logits, 300, top_k=2, top_p=0.2)) == {0}


def test_top_p_wider_than_the_first_look_uses_the_whole_vocabulary() -> None:
    flat = torch.zeros(5000)
    got = draws(flat, 400, top_p=0.99)
    assert max(got) > 1024
    assert len(set(got)) > 300


def test_a_seed_decides_whatever_the_batch_mates() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(3))
    others = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    alone, mixed = state(params(seed=7), 0), state(params(seed=7), 0)
    mates = [state(params(seed=9, top_p=0.5), 0), state(params(temperature=0), 0), state(params(), 0)]
    for _ in range(20):
        a = sample(logits, [alone])[0][0]
        b = sample(torch.cat([others[:2], logits, others[2:]]), [*mates[:2], mixed, mates[2]])[2][0]
        assert a == b


def test_choices_of_one_seed_differ() -> None:
    flat = torch.zeros(1, 1000)
    a, b = state(params(seed=7), 0), state(params(seed=7), 1)
    assert [sample(flat, [a])[0][0] for _ in range(5)] != [sample(flat, [b])[0][0] for _ in range(5)]


def test_penalties_count_generated_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    s = state(params(temperature=0, presence_penalty=0.5, frequency_penalty=0.4), 0)
    # 0: 5 | then 5-0.9=4.1 | then 5-1.3=3.7 < 4 | then 3.7 > 4-0.9=3.1 | then 5-1.7=3.3 > 3.1
    assert [sample(logits, [s])[0][0] for _ in range(5)] == [0, 0, 1, 0, 0]


def test_logit_bias_adds() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    assert sample(logits, [state(params(temperature=0, logit_bias=((2, 6.0),)), 0)])[0][0] == 2
    assert sample(logits, [state(params(temperature=0, logit_bias=((0, -100.0),)), 0)])[0][0] == 1


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    given = params(temperature=0, logit_bias=((2, 9.0),), top_logprobs=2)
    ((token, logprobs),) = sample(logits, [state(given, 0)])
    total = math.log(sum(math.exp(x) for x in (2, 1, 0)))
    assert token == 2
    assert logprobs is not None
    assert logprobs.chosen == pytest.approx(0 - total, abs=1e-5)
    assert [t for t, _ in logprobs.top] == [0, 1]
    assert logprobs.top[0][1] == pytest.approx(2 - total, abs=1e-5)


def test_half_precision_logits() -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert sample(logits, [state(params(temperature=0, top_logprobs=0), 0)])[0][0] == int(logits.argmax())
