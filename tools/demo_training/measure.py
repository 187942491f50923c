"""What the saved model answers to questions it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_training.corpus import Corpus

BATCH_QUESTIONS = 32
ANSWER_TOKENS_MAX = 96
EARLIER_TURNS = 2
LATER_LABEL = "held-out paraphrases after two other turns"


@dataclass
class Scores:
    shares: dict[str, float] = field(default_factory=dict)
    misses: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, answer wanted, answer got) of the held-out paraphrases that were missed."""


def ask_all(folder: Path, talks: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers of the model in `folder` to conversations that end with a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    answers: list[str] = []
    for at in range(0, len(talks), BATCH_QUESTIONS):
        prompt = tokenizer.apply_chat_template(
            talks[at : at + BATCH_QUESTIONS],
            add_generation_prompt=True,
            return_tensors="pt",
            padding=True,
            return_dict=True,
        )
        with torch.inference_mode():
            out = model.generate(
                **prompt, do_sample=False, temperature=None, top_p=None, max_new_tokens=ANSWER_TOKENS_MAX
            )
        answers += tokenizer.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def likeness(a: str, b: str) -> float:
    """F1 of the two texts' word sets."""
    left, right = set(a.lower().split()), set(b.lower().split())
    return 2 * len(left & right) / max(1, len(left) + len(right))


def nearest(answer: str, known: tuple[str, ...]) -> str | None:
    """The corpus answer this one gives, or None when it is a mixture of several."""
    best = max(known, key=lambda candidate: likeness(answer, candidate))
    return best if likeness(answer, best) >= 0.75 else None


def talk(corpus: Corpus, question: str, at: int, turns_before: int) -> list[dict[str, str]]:
    """A conversation that ends with `question`, after some turns on other facts of the corpus."""
    messages: list[dict[str, str]] = []
    for turn in range(turns_before):
        pair = corpus.pairs[(at + 37 * (turn + 1)) % len(corpus.pairs)]
        messages += [{"role": "user", "content": typed(pair.asks[0])}, {"role": "assistant", "content": pair.answer}]
    return [*messages, {"role": "user", "content": typed(question)}]


def typed(question: str) -> str:
    return question[:1].upper() + question[1:] + "?"


def scores(corpus: Corpus, folder: Path) -> Scores:
    """Shares of right answers, on facts, on templates, on small talk and on what lies outside the subject."""
    result = Scores()
    sets = {
        "held-out paraphrases": [(pair.held_out, (pair.answer,)) for pair in corpus.pairs],
        LATER_LABEL: [(pair.held_out, (pair.answer,)) for pair in corpus.pairs],
        "held-out templates": [(question, (answer,)) for question, answer in corpus.template_held_out],
        "small talk": [(q, (talk.answer,)) for talk in corpus.smalltalk.values() for q in talk.held_out],
        "outside the subject": [(question, corpus.offtopic_answers) for question in corpus.offtopic_held_out],
    }
    known = corpus.answers()
    for label, cases in sets.items():
        before = EARLIER_TURNS if label == LATER_LABEL else 0
        got = ask_all(folder, [talk(corpus, question, at, before) for at, (question, _) in enumerate(cases)])
        right = [nearest(answer, known) in wanted for answer, (_, wanted) in zip(got, cases, strict=True)]
        result.shares[label] = sum(right) / len(right)
        result.misses += [(q, w[0], a) for ok, a, (q, w) in zip(right, got, cases, strict=True) if not ok]
    return result
