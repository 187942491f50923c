"""Say a question in other words: what makes it findable is kept, the rest is left out, swapped, mistyped.

A model this small learns to answer rewordings only if it learns which words matter. So half of the questions are
made from a fact's own words (of its questions and its answer), taken at random but so that no other fact has them
all, in a random frame.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict

from demo_training.corpus import Corpus

# Words that say nothing about which fact is meant.
FUNCTION_WORDS = frozenset(
    """a an and are as at be by can could did do does for from get give had has have i if in is it its may me my
    of on one or please shall should so some tell than that the their them then there these they this to up
    us was we were what whats which will with would you your about much make made makes like called mean
    means exactly say word talk explain know want describe something short question teach""".split()  # noqa: SIM905
)
FRAMES = """what is | what are | what's | which is | tell me about | explain | describe | how | how is | how are | how
do | how do i | how does | how can i | how can | why | why is | why are | why do | why does | who | where |
when | when is | which | name | is | are | do | does | can | can you explain | could you tell me | i want to
know | do you know | what about | what do you know about | what does | what do | is there | are there |
please explain | what makes | what causes | how come | what happens with | give me | in which | in what way
| for what"""
FRAME_LIST = tuple(frame.strip() for frame in " ".join(FRAMES.split()).split("|"))
JOINTS = ("the", "a", "of", "in", "to", "and", "for", "with", "is", "on", "from", "at", "it", "by", "an", "you", "do")
# (start of a question, another that people type for it)
CONTRACTIONS = tuple(
    tuple(line.strip().split(" / "))
    for line in """
    what is / what's
    what is / whats
    who is / who's
    where is / where's
    why do / how come
    why is / how come
    can i / could i
    can you / could you
    should i / do i
    what makes / what causes
    how do i / how can i
    how do i / how to
    how do you / how do i
    how big / how large
    what happens / what will happen
    """.strip().splitlines()
)
TYPO_SHARE, PICKED_SHARE, TEMPLATE_SHARE = 0.10, 0.5, 0.3
TRIES_MAX = 6


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:'[a-z]+)?|\d[\d,.]*\d|\d", text.lower())


def stem(word: str) -> str:
    """The word without a common ending, so that "tide" and "tides" are one."""
    for ending in ("'s", "ing", "ies", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class Reworder:
    """Makes questions from a corpus's facts. Seeded by the dice it is given."""

    def __init__(self, corpus: Corpus, dice: random.Random) -> None:
        self.corpus = corpus
        self.dice = dice
        self._holders: dict[str, set[int]] = defaultdict(set)
        for at, pair in enumerate(corpus.pairs):
            for text in (*pair.asks, pair.about or "", pair.answer):
                for word in words_of(text):
                    self._holders[stem(word)].add(at)

    def ask(self, at: int) -> str:
        """A question for fact number `at`."""
        pair = self.corpus.pairs[at]
        if self.dice.random() < PICKED_SHARE:
            for _ in range(TRIES_MAX):
                words = self._pick(at)
                if self._only(at, words):
                    return self.dress(self._mistype(self._compose(words)))
        templated = pair.templated and self.dice.random() < TEMPLATE_SHARE
        return self.reword(self.dice.choice(pair.templated if templated else pair.asks))

    def _pick(self, at: int) -> list[str]:
        """Some telling words of the fact, mostly in the order they were written."""
        dice, pair = self.dice, self.corpus.pairs[at]
        if dice.random() < 0.75:
            words = [w for w in words_of(dice.choice(pair.asks)) if w not in FUNCTION_WORDS]
            words = [w for w in words if dice.random() < 0.8]
        else:
            words = []
        extra = pair.answer if not words or dice.random() < 0.2 else dice.choice(pair.asks)
        if len(words) < 2 or dice.random() < 0.3:
            more = [w for w in words_of(extra) if w not in FUNCTION_WORDS and w not in words]
            start = dice.randrange(max(1, len(more)))
            words += more[start : start + dice.randint(1, 3)]
        if dice.random() < 0.25:
            dice.shuffle(words)
        return words[:7]

    def _only(self, at: int, words: list[str]) -> bool:
        """Whether fact `at` is the only one that holds all these words."""
        holders = [self._holders[stem(word)] for word in words]
        return bool(holders) and set.intersection(*holders) == {at}

    def _compose(self, words: list[str]) -> str:
        dice = self.dice
        parts: list[str] = [dice.choice(FRAME_LIST)] if dice.random() < 0.75 else []
        for word in words:
            if dice.random() < 0.35:
                parts.append(dice.choice(JOINTS))
            parts.append(self._inflect(word))
        return " ".join(parts)

    def _inflect(self, word: str) -> str:
        if len(word) < 4 or self.dice.random() > 0.08:
            return word
        return (
            word[:-1]
            if word.endswith("s")
            else self.dice.choice((word + "s", word + "s", stem(word), stem(word) + "ing"))
        )

    def reword(self, question: str, shuffle: bool = False) -> str:
        """The same question as another person would type it; with `shuffle`, some of its words in another frame."""
        dice = self.dice
        if shuffle and (words := [w for w in words_of(question) if w not in FUNCTION_WORDS]):
            return self.dress(self._mistype(self._compose(dice.sample(words, dice.randint(1, len(words))))))
        for plain, other in CONTRACTIONS:
            if question.startswith(plain + " ") and dice.random() < 0.12:
                question = other + question[len(plain) :]
        for a, b in self.corpus.synonyms:
            if dice.random() < 0.2:
                question = re.sub(rf"\b{a}\b", b, question)
        if dice.random() < 0.10:
            words = question.split()
            kept = [word for word in words if word not in FUNCTION_WORDS or dice.random() < 0.5]
            question = " ".join(kept if len(kept) > 1 else words)
        if dice.random() < 0.15:
            question = dice.choice(self.corpus.openers) + question
        if dice.random() < 0.06:
            question += dice.choice(self.corpus.closers)
        return self.dress(self._mistype(question))

    def dress(self, question: str) -> str:
        """Case and punctuation."""
        dice = self.dice
        style = dice.random()
        if style < 0.50:
            return question[:1].upper() + question[1:] + dice.choice(("?", "?", "?", "?", ".", "", "??"))
        if style < 0.82:
            return question + dice.choice(("", "", "", "?", " ?", "."))
        if style < 0.96:  # proper names typed as such, and people who capitalise at random
            chance = dice.choice((0.2, 0.5, 1.0))
            words = question.split()
            words = [
                w.capitalize() if not i or (len(w) > 3 and dice.random() < chance) else w for i, w in enumerate(words)
            ]
            return " ".join(words) + dice.choice(("?", "?", ""))
        return question.upper() + dice.choice(("", "?"))

    def _mistype(self, question: str) -> str:
        if not question or self.dice.random() > TYPO_SHARE:
            return question
        at = self.dice.randrange(len(question))
        match self.dice.randrange(4):
            case 0:
                return question[:at] + question[at + 1 :] or question
            case 1:
                return question[:at] + question[at] + question[at:]
            case 2 if at + 1 < len(question):
                return question[:at] + question[at + 1] + question[at] + question[at + 2 :]
            case _:
                return question[:at] + self.dice.choice("abcdefghijklmnopqrstuvwxyz") + question[at + 1 :]
