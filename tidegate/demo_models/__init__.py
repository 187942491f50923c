"""Four tiny chat models that ship with tidegate, so that a new installation answers at once and shows who spoke.

Each folder beside this file is a Hugging Face directory (`LlamaForCausalLM`, safetensors in bfloat16, at most 4 MB),
trained on text written for this project by `tools/train_demo_models.py`. Each model knows one subject, says its name
when asked who it is, and declines anything else. Weights and corpus are Apache-2.0; the README.md in each folder is the
model's card. This module imports nothing but the standard library.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

NAMES: Final[tuple[str, ...]] = ("tides", "stars", "bread", "bees")

QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "tides": (
        "Who are you?",
        "What causes the tides?",
        "What is a spring tide?",
        "Where are the highest tides in the world?",
        "Why do lighthouses flash?",
        "Why is the sea salty?",
        "What is a breakwater?",
        "How do I escape a rip current?",
        "What lives in a rock pool?",
        "What is the Gulf Stream?",
    ),
    "stars": (
        "Who are you?",
        "Why is Mars red?",
        "How many planets are there?",
        "How do I find the North Star?",
        "What is a black hole?",
        "Why do stars twinkle?",
        "What is a shooting star?",
        "What are Saturn's rings made of?",
        "Which telescope should I buy?",
        "How far away is the Andromeda galaxy?",
    ),
    "bread": (
        "Who are you?",
        "How do I make bread?",
        "Why does dough rise?",
        "What is sourdough?",
        "Why is my bread dense?",
        "How do I know when bread is done?",
        "How do I keep bread fresh?",
        "Why do you knead dough?",
        "What is a baguette?",
        "How much salt for bread?",
    ),
    "bees": (
        "Who are you?",
        "How do bees make honey?",
        "What does the queen bee do?",
        "Why do bees dance?",
        "Why do bees swarm?",
        "What is the Varroa mite?",
        "Why do beekeepers use smoke?",
        "Which flowers are good for bees?",
        "How many bees live in a hive?",
        "Why are honeycomb cells hexagons?",
    ),
}
"""Questions each model answers from its own subject; the first is always the one it answers with its name."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that one model's answers are full of and no other model's hold, and words it may share with another. Every
# answer of the corpus is told apart by them (tests/test_demo_models.py): else a stray answer could pass for another
# endpoint's.
_OWN: Final[dict[str, frozenset[str]]] = {
    "tides": _words(
        """tide tides tidal shore coast beach harbour harbours lighthouse lighthouses sailor sailors sailor's boat
        boats wave waves channel reef hull quay port starboard stern iceberg icebergs estuary currents seaweed
        headland pacific wreck keel anchor mariana lagoon crab crabs jellyfish sextant ships ship's"""
    ),
    "stars": _words(
        """star stars planet planets telescope telescopes telescope's universe galaxy galaxies comet comets solar
        moons jupiter saturn saturn's mars venus mercury neptune uranus pluto astronomers astronomical supernova
        asteroid asteroids astronauts constellation constellations nebula milky magnitude meteorite lava
        stargazers"""
    ),
    "bread": _words(
        """bread dough flour loaf loaves yeast sourdough baking bake baked baker bakers oven crust crumb gluten
        knead kneading rye wholemeal starch slices slice toast butter starter wheat rolls buns batter"""
    ),
    "bees": _words(
        """bee bees bees' honey hive hives queen queens colony colonies brood comb nectar pollen swarm beekeeper
        beekeepers beekeeping wax beeswax honeycomb drones sting larvae mites varroa"""
    ),
}
_SHARED: Final[dict[str, frozenset[str]]] = {
    "tides": _words("sea seas ocean salty water ship fog light"),
    "stars": _words("sun sun's moon moon's sky space earth's orbit gravity eclipse light"),
    "bread": _words("grain sugar"),
    "bees": _words("flower flowers leaves entrance"),
}
_OWN_WEIGHT: Final = 4


def path(name: str) -> Path:
    """The model directory of `name`. Raises ValueError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"no demo model {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).resolve().parent / name


def recognise(text: str) -> str | None:
    """Which model wrote `text`, told by its words; None when no model's words are in the majority.

    Its own introduction decides alone: "I am bees" is said by no other model.
    """
    lowered = text.lower()
    if said := re.search(rf"\bi am ({'|'.join(NAMES)})\b", lowered):
        return said.group(1)
    words = re.findall(r"[a-z']+", lowered)
    weights = {
        name: sum(_OWN_WEIGHT * (word in _OWN[name]) + (word in _SHARED[name]) for word in words) for name in NAMES
    }
    second, first = sorted(weights.values())[-2:]
    return max(weights, key=weights.__getitem__) if first > second else None
