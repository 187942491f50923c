"""From logits to tokens. One draw a token from the sequence's own generator, so that batch mates cannot shift it.

Order as in transformers and vLLM: penalties and bias, then temperature, top-k, top-p. Temperature 0 is argmax.
Logprobs are of the unmodified distribution (vLLM's `raw_logprobs`).
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_TRUNCATED_MIN = (
    1024  # candidates looked at first for top-p alone; the whole vocabulary only if their mass is too small
)
TEMPERATURE_MIN = 1e-3  # below it a division overflows float16 logits; it is greedy in all but name


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`top_k` 0 and `top_p` 1 mean off; `top_logprobs` None means no logprobs, 0 only the chosen token's."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < TEMPERATURE_MIN

    @property
    def reshapes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(slots=True)
class SamplerState:
    """What one sequence carries from token to token. `counts` is of generated tokens, kept only for penalties."""

    params: SamplingParams
    rng: random.Random
    counts: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms. `top` is most likely first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def state(params: SamplingParams, choice: int) -> SamplerState:
    """Choice i of a seeded request draws from its own stream; without a seed the system's entropy is used."""
    rng = random.Random() if params.seed is None else random.Random(f"{params.seed}:{choice}")
    return SamplerState(params, rng)


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[tuple[int, TokenLogprobs | None]]:
    """logits [len(states), vocab], one row a sequence; advances each state by one token."""
    if all(s.params.greedy and not s.params.reshapes and s.params.top_logprobs is None for s in states):
        return [(token, None) for token in logits.argmax(-1).tolist()]
    raw = logits.float()
    scores = _reshape(raw, states) if any(s.params.reshapes for s in states) else raw
    tokens = _choose(scores, states)
    for token, s in zip(tokens, states, strict=True):
        if s.params.presence_penalty or s.params.frequency_penalty:
            s.counts[token] += 1
    return [
        (token, _logprobs(raw[i], token, s.params)) for i, (token, s) in enumerate(zip(tokens, states, strict=True))
    ]


def _reshape(raw: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    scores = raw.clone()
    for i, s in enumerate(states):
        p = s.params
        if s.counts:
            tokens = torch.tensor(list(s.counts.keys()), device=raw.device)
            seen = torch.tensor(list(s.counts.values()), device=raw.device, dtype=scores.dtype)
            scores[i, tokens] -= p.presence_penalty + p.frequency_penalty * seen
        for token, bias in p.logit_bias:
            scores[i, token] += bias
    return scores


def _choose(scores: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    tokens = scores.argmax(-1).tolist()
    whole = [i for i, s in enumerate(states) if not s.params.greedy and not _truncates(s.params)]
    part = [i for i, s in enumerate(states) if not s.params.greedy and _truncates(s.params)]
    if whole:
        chosen = _draw(_scaled(scores, whole, states).softmax(-1), [states[i].rng.random() for i in whole])
        for i, token in zip(whole, chosen.tolist(), strict=True):
            tokens[i] = token
    if part:
        draws = [states[i].rng.random() for i in part]
        drawn = _draw_truncated(_scaled(scores, part, states), [states[i].params for i in part], draws)
        for i, token in zip(part, drawn, strict=True):
            tokens[i] = token
    return tokens


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _scaled(scores: torch.Tensor, rows: list[int], states: Sequence[SamplerState]) -> torch.Tensor:
    temperature = torch.tensor([states[i].params.temperature for i in rows], device=scores.device)
    return scores[rows] / temperature[:, None]


def _draw(probabilities: torch.Tensor, draws: list[float]) -> torch.Tensor:
    """Inverse of the cumulative distribution. [rows, candidates] -> [rows] places of the chosen ones."""
    cumulative = probabilities.double().cumsum(-1)
    aim = torch.tensor(draws, device=probabilities.device, dtype=torch.double) * cumulative[:, -1]
    place = torch.searchsorted(cumulative, aim[:, None], right=True).squeeze(-1)
    return place.clamp(max=probabilities.shape[-1] - 1)


def _draw_truncated(scores: torch.Tensor, params: list[SamplingParams], draws: list[float]) -> list[int]:
    """top-k, then top-p over what is left; a token is kept while the mass before it is below top_p."""
    vocab = scores.shape[-1]
    width = min(vocab, max([_TRUNCATED_MIN, *(p.top_k for p in params)]))
    while True:
        values, places = scores.topk(width, dim=-1)
        ranks = torch.arange(width, device=scores.device)
        top_k = torch.tensor([p.top_k or vocab for p in params], device=scores.device)
        values = values.masked_fill(ranks[None, :] >= top_k[:, None], float("-inf"))
        # Without top-k the mass is over the whole vocabulary, of which `values` is only the head.
        total = torch.where(top_k < vocab, values.logsumexp(-1), scores.logsumexp(-1))
        mass = (values - total[:, None]).exp()
        before = mass.cumsum(-1) - mass
        top_p = torch.tensor([p.top_p for p in params], device=scores.device)
        short = (top_k >= vocab) & (before[:, -1] + mass[:, -1] < top_p)
        if width == vocab or not bool(short.any()):
            kept = mass.masked_fill((before >= top_p[:, None]) & (ranks > 0), 0.0)
            return places.gather(1, _draw(kept, draws)[:, None]).squeeze(-1).tolist()
        width = vocab


def _logprobs(raw: torch.Tensor, token: int, params: SamplingParams) -> TokenLogprobs | None:
    if params.top_logprobs is None:
        return None
    logs = raw - raw.logsumexp(-1)
    top: tuple[tuple[int, float], ...] = ()
    if params.top_logprobs:
        values, places = logs.topk(min(params.top_logprobs, logs.shape[-1]))
        top = tuple(zip(places.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logs[token]), top)
