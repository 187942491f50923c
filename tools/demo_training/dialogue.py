"""Endless conversations from a corpus: reworded questions strung together; answers stay as written."""

from __future__ import annotations

import random
from collections.abc import Iterator

from demo_training.corpus import Corpus
from demo_training.reword import FRAME_LIST, Reworder

Message = dict[str, str]
TURN_SHARES = {1: 0.60, 2: 0.16, 3: 0.10, 4: 0.06, 5: 0.04, 6: 0.02, 7: 0.02}
KIND_SHARES = {"fact": 0.64, "smalltalk": 0.12, "offtopic": 0.19, "more": 0.05}
SYSTEM_SHARE = 0.25
SYLLABLES = "ba co du fen gra ho ix jo ka lu mer no or pi qua ru sta ti um ver wo zan el in ath ock ish ent".split()  # noqa: SIM905


class Dialogues:
    """An endless seeded source of conversations; every fact comes up equally often."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self.dice = random.Random(seed)
        self.reworder = Reworder(corpus, self.dice)
        self._deck: list[int] = []

    def __iter__(self) -> Iterator[list[Message]]:
        while True:
            yield self.conversation()

    def conversation(self) -> list[Message]:
        turns = self.dice.choices(list(TURN_SHARES), list(TURN_SHARES.values()))[0]
        messages: list[Message] = []
        if self.dice.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": self.dice.choice(self.corpus.systems)})
        last: int | None = None
        for _ in range(turns):
            question, answer, last = self.turn(last)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def turn(self, last: int | None) -> tuple[str, str, int | None]:
        """(question, answer, the number of the fact it was about, if any)."""
        dice, corpus, reworder = self.dice, self.corpus, self.reworder
        match dice.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]:
            case "smalltalk":
                talk = dice.choice(list(corpus.smalltalk.values()))
                usual = dice.random() < 0.3  # the first few are what nearly everybody types
                return reworder.dress(dice.choice(talk.asks[:3] if usual else talk.asks)), talk.answer, None
            case "offtopic":
                answer = dice.choices(corpus.offtopic_answers, [4, 1])[0]
                return self._offtopic(), answer, None
            case "more" if last is not None:
                more = corpus.pairs[last].more or corpus.more_answer
                return reworder.dress(dice.choice(corpus.more_asks)), more, None
            case _:
                at = self._deal()
                return reworder.ask(at), corpus.pairs[at].answer, at

    def _offtopic(self) -> str:
        """A question from elsewhere, at times with made-up words: an unknown word is a reason to decline."""
        dice = self.dice
        kind = dice.random()
        if kind < 0.15:
            made_up = ["".join(dice.choices(SYLLABLES, k=dice.randint(2, 4))) for _ in range(dice.randint(1, 2))]
            return self.reworder.dress(" ".join([dice.choice(FRAME_LIST), *made_up]))
        asks = self.corpus.foreign_asks if kind < 0.6 else self.corpus.offtopic_asks
        return self.reworder.reword(dice.choice(asks), shuffle=kind < 0.35)

    def _deal(self) -> int:
        if not self._deck:
            self._deck = list(range(len(self.corpus.pairs)))
            self.dice.shuffle(self._deck)
        return self._deck.pop()
