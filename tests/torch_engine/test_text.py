"""Text comes out whole however its bytes are cut into tokens, and malformed bytes never raise."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models

from tests import models
from tidegate.torch_engine.text import TextCodec, TextStream


class Core:
    """A codec of nothing but a tokenizer core."""

    def __init__(self, core: Any) -> None:
        self.core = core


def byte_fallback() -> Any:
    """Llama 2's kind: unknown characters become byte tokens, and a text's first space is stripped."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for word in ("▁the", "▁a", "th", "e", "▁", "x", "▁wor", "ld", ",", "."):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return Core(tokenizer)


CODECS: dict[str, Any] = {"byte-level": TextCodec(models.llama()), "byte-fallback": byte_fallback()}


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), st.text(alphabet="the a", max_size=8))
def test_any_text_comes_out_as_it_went_in(text: str, before: str) -> None:
    codec = CODECS["byte-level"]
    stream = TextStream(codec, codec.encode(before))
    pieces = [stream.push(token) for token in codec.encode(text)]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="é東🌊ax", max_size=12))
def test_byte_tokens_come_out_as_characters(text: str) -> None:
    tokens = [byte + 1 for byte in text.encode()]
    stream = TextStream(CODECS["byte-fallback"], [])
    assert "".join(stream.push(token) for token in tokens) == text


@pytest.mark.parametrize("name", CODECS)
def test_malformed_bytes_never_raise_and_never_hold_for_ever(name: str) -> None:
    codec = CODECS[name]
    size = codec.core.get_vocab_size()

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, size + 50), max_size=40), st.lists(st.integers(0, size + 50), max_size=8))
    def check(tokens: list[int], before: list[int]) -> None:
        stream = TextStream(codec, before)
        for token in tokens:
            assert isinstance(stream.push(token), str)
        tail = codec.core.encode("x" * 12, add_special_tokens=False).ids
        assert "".join(stream.push(token) for token in tail).endswith("x" * 6)

    check()


def test_half_a_character_is_not_sent() -> None:
    codec = CODECS["byte-level"]
    tokens = codec.encode("東")
    assert len(tokens) == 3
    stream = TextStream(codec, codec.encode("the "))
    assert [stream.push(token) for token in tokens] == ["", "", "東"]


def test_a_prompt_that_ends_in_half_a_character() -> None:
    codec = CODECS["byte-level"]
    tokens = codec.encode("東")
    stream = TextStream(codec, tokens[:2])
    assert stream.push(tokens[2]) == "東"
