"""What the saved model answers to questions it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_training.corpus import Corpus

BATCH_QUESTIONS = 32
ANSWER_TOKENS_MAX = 96


@dataclass
class Scores:
    shares: dict[str, float] = field(default_factory=dict)
    misses: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, answer wanted, answer got) of the held-out paraphrases that were missed."""


def ask_all(folder: Path, questions: list[str]) -> list[str]:
    """Greedy answers of the model in `folder`, each to a fresh conversation of one question."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    answers: list[str] = []
    for at in range(0, len(questions), BATCH_QUESTIONS):
        talks = [[{"role": "user", "content": question}] for question in questions[at : at + BATCH_QUESTIONS]]
        prompt = tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
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


def typed(question: str) -> str:
    return question[:1].upper() + question[1:] + "?"


def scores(corpus: Corpus, folder: Path) -> Scores:
    """Shares of right answers, on facts, on templates, on small talk and on what lies outside the subject."""
    result = Scores()
    sets = {
        "held-out paraphrases": [(pair.held_out, (pair.answer,)) for pair in corpus.pairs],
        "held-out templates": [(question, (answer,)) for question, answer in corpus.template_held_out],
        "small talk": [(q, (talk.answer,)) for talk in corpus.smalltalk.values() for q in talk.held_out],
        "outside the subject": [(question, corpus.offtopic_answers) for question in corpus.offtopic_held_out],
    }
    known = corpus.answers()
    for label, cases in sets.items():
        got = ask_all(folder, [typed(question) for question, _ in cases])
        right = [nearest(answer, known) in wanted for answer, (_, wanted) in zip(got, cases, strict=True)]
        result.shares[label] = sum(right) / len(right)
        result.misses += [(q, w[0], a) for ok, a, (q, w) in zip(right, got, cases, strict=True) if not ok]
    return result
