"""Read a subject's TOML file and the shared one into plain frozen records."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

NAMES = ("tides", "stars", "bread", "bees")


@dataclass(frozen=True)
class Pair:
    """One fact: the ways it is asked in training, one way it is not, and its only answer."""

    asks: tuple[str, ...]
    templated: tuple[str, ...]
    """Questions made from `about`; empty without it."""
    held_out: str
    answer: str
    about: str | None
    more: str | None
    """What "tell me more" gets after this answer; None means the subject's general reply."""


@dataclass(frozen=True)
class SmallTalk:
    asks: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Corpus:
    """All that one model learns, and what it is measured on."""

    name: str
    subject: str
    pairs: tuple[Pair, ...]
    smalltalk: dict[str, SmallTalk]
    offtopic_asks: tuple[str, ...]
    foreign_asks: tuple[str, ...]
    """The other models' questions, declined here."""
    offtopic_held_out: tuple[str, ...]
    offtopic_answers: tuple[str, ...]
    more_asks: tuple[str, ...]
    more_answer: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    systems: tuple[str, ...]
    synonyms: tuple[tuple[str, str], ...]
    template_held_out: tuple[tuple[str, str], ...]
    """(question made from a held-out template, its answer)."""

    def answers(self) -> tuple[str, ...]:
        small = tuple(talk.answer for talk in self.smalltalk.values())
        return tuple(pair.answer for pair in self.pairs) + small + self.offtopic_answers + (self.more_answer,)


def load(folder: Path, name: str) -> Corpus:
    """The corpus of `name`; it declines the other subjects' questions. Raises KeyError on a malformed file."""
    common = tomllib.loads((folder / "common.toml").read_text("utf-8"))
    subjects = {other: tomllib.loads((folder / f"{other}.toml").read_text("utf-8")) for other in NAMES}
    own = subjects[name]
    replies = own["replies"]

    def named(texts: list[str]) -> tuple[str, ...]:
        return tuple(text.replace("{name}", name) for text in texts)

    smalltalk = {
        kind: SmallTalk(named(talk["ask"]), named(talk["held_out"]), replies[kind])
        for kind, talk in common["smalltalk"].items()
    }
    offtopic = common["offtopic"]
    foreign, foreign_held_out = _foreign(subjects, own)
    generic = tuple(template.format(x=x) for x in offtopic["topics"] for template in _templates(common, None))
    held_out_topics = tuple(f"tell me about {x}" for x in offtopic["topics_held_out"])
    return Corpus(
        name=name,
        subject=own["subject"],
        pairs=_pairs(own["pair"], common),
        smalltalk=smalltalk,
        offtopic_asks=tuple(offtopic["ask"]) * 8 + generic,
        foreign_asks=foreign,
        offtopic_held_out=tuple(offtopic["held_out"]) + held_out_topics + foreign_held_out,
        offtopic_answers=tuple(replies["offtopic"]),
        more_asks=tuple(common["more"]),
        more_answer=replies["more"],
        openers=named(common["openers"]),
        closers=named(common["closers"]),
        systems=named(common["systems"]),
        synonyms=tuple((a, b) for a, b in own["synonyms"]),
        template_held_out=_template_held_out(own["pair"], common),
    )


def _templates(common: dict, plural: bool | None) -> list[str]:
    match plural:
        case None:
            return common["templates"] + common["templates_singular"][:1]
        case True:
            return common["templates"] + common["templates_plural"]
        case False:
            return common["templates"] + common["templates_singular"]


def _pairs(rows: list[dict], common: dict) -> tuple[Pair, ...]:
    pairs = []
    for i, row in enumerate(rows):
        templated: list[str] = []
        if about := row.get("about"):
            templated = [template.format(x=about) for template in _templates(common, row.get("plural", False))]
        more = rows[i + 1]["answer"] if row.get("more") and i + 1 < len(rows) else None
        pairs.append(Pair(tuple(row["ask"]), tuple(templated), row["held_out"], row["answer"], about, more))
    return tuple(pairs)


def _template_held_out(rows: list[dict], common: dict) -> tuple[tuple[str, str], ...]:
    held = common["templates_held_out"]
    asked = [row for row in rows if "about" in row]
    return tuple((held[i % len(held)].format(x=row["about"]), row["answer"]) for i, row in enumerate(asked))


def _foreign(subjects: dict[str, dict], own: dict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The other subjects' questions, less those that name something this subject speaks of too (`shared_words`)."""
    shared = set(own["shared_words"])
    asks: list[str] = []
    held_out: list[str] = []
    for name, subject in subjects.items():
        if name == own["name"]:
            continue
        for i, row in enumerate(subject["pair"]):
            questions = row["ask"] + ([f"tell me about {row['about']}", row["about"]] if "about" in row else [])
            asks += [q for q in questions if not shared & set(q.split())]
            if i % 8 == 0 and not shared & set(row["held_out"].split()):
                held_out.append(row["held_out"])
    return tuple(asks), tuple(held_out)
