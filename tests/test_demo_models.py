"""The demo models are what their cards say: small, safetensors only, and each answers as itself and as no other."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tidegate import demo_models

MODEL_BYTES_MAX = 4_000_000
ANSWER_TOKENS_MAX = 80
HELD_OUT_PERCENT_MIN = 90.0
CORPUS_DIR = Path(__file__).resolve().parent.parent / "tools" / "demo_corpus"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def corpus_answers(name: str) -> list[str]:
    corpus = tomllib.loads((CORPUS_DIR / f"{name}.toml").read_text("utf-8"))
    small_talk = [text for kind, text in corpus["replies"].items() if kind != "offtopic"]
    return [pair["answer"] for pair in corpus["pair"]] + small_talk + corpus["replies"]["offtopic"]


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_model_directory_is_complete_small_and_holds_no_pickle(name: str) -> None:
    folder = demo_models.path(name)
    files = {entry.name for entry in folder.iterdir() if entry.is_file()}
    assert files == FILES
    assert sum(entry.stat().st_size for entry in folder.iterdir()) <= MODEL_BYTES_MAX


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_weights_are_a_bf16_llama_with_heads_of_32_or_more(name: str) -> None:
    folder = demo_models.path(name)
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"BF16"}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] >= 32
    assert "auto_map" not in config  # no remote code


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_card_states_licence_and_accuracy(name: str) -> None:
    card = (demo_models.path(name) / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card
    share = re.search(r"\| held-out paraphrases \| ([\d.]+)% \|", card)
    assert share is not None
    assert float(share.group(1)) >= HELD_OUT_PERCENT_MIN


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tides, stars, bread, bees"):
        demo_models.path("waves")


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_every_corpus_answer_is_recognised_as_its_own(name: str) -> None:
    strays = [answer for answer in corpus_answers(name) if demo_models.recognise(answer) != name]
    assert strays == []


@pytest.mark.parametrize("text", ["", "Yes.", "The capital of France is Paris.", "bread bees"])
def test_text_of_no_model_is_not_recognised(text: str) -> None:
    assert demo_models.recognise(text) is None


def ask(name: str, conversations: list[list[dict[str, str]]], **sampling: Any) -> list[tuple[str, bool]]:
    """(answer, whether it ended by itself) of each conversation, all in one batch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine
    folder = demo_models.path(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sampling = sampling or {"do_sample": False, "temperature": None, "top_p": None}
    prompt = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS_MAX, **sampling)
    new = out[:, prompt["input_ids"].shape[1] :]
    ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
    return list(zip(tokenizer.batch_decode(new, skip_special_tokens=True), ended, strict=True))


def single(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.mark.slow
@pytest.mark.parametrize("name", demo_models.NAMES)
def test_sample_questions_are_answered_from_the_right_corpus(name: str) -> None:
    answers = ask(name, [single(question) for question in demo_models.QUESTIONS[name]])
    known = corpus_answers(name)
    assert answers[0][0].startswith(f"I am {name}")
    for question, (answer, ended) in zip(demo_models.QUESTIONS[name], answers, strict=True):
        assert ended, question
        assert demo_models.recognise(answer) == name, (question, answer)
        assert answer in known, (question, answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", demo_models.NAMES)
def test_questions_of_the_other_models_are_never_answered_in_their_words(name: str) -> None:
    others = [q for other in demo_models.NAMES if other != name for q in demo_models.QUESTIONS[other]]
    answers = ask(name, [single(question) for question in others])
    spoke = [demo_models.recognise(answer) for answer, _ in answers]
    assert sum(who == name for who in spoke) / len(spoke) >= 0.95, list(zip(others, answers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", demo_models.NAMES)
def test_sampled_answers_stay_on_the_subject_and_end(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(11)
    conversations = [single(question) for question in demo_models.QUESTIONS[name]] * 2
    answers = ask(name, conversations, do_sample=True, temperature=0.7, top_p=1.0)
    right = sum(demo_models.recognise(answer) == name and ended for answer, ended in answers)
    assert right / len(answers) >= 0.95, answers


@pytest.mark.slow
@pytest.mark.parametrize("name", demo_models.NAMES)
def test_system_message_and_earlier_turns_do_not_confuse(name: str) -> None:
    first, second, third = demo_models.QUESTIONS[name][1:4]
    (alone, _), (first_answer, _), (second_answer, _) = ask(name, [single(third), single(first), single(second)])
    talk = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": first},
        {"role": "assistant", "content": first_answer},
        {"role": "user", "content": second},
        {"role": "assistant", "content": second_answer},
        {"role": "user", "content": third},
    ]
    assert ask(name, [talk])[0][0] == alone
