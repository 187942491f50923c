"""Texts to token ids and back. The tokenizer's Rust core is used directly: it is what a step can afford."""

import array
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tidegate.domain.errors import Refusal
from tidegate.torch_engine.faults import ModelFault

_PRIMING_TOKENS = 6  # tokens a decoder looks back at, so that a space before the next one survives
_DECODED_TOKENS_MAX = 24  # then the window moves on: a decode a token must not grow with the answer
_BROKEN = "\ufffd"
_CHARACTER_TOKENS_MAX = 5  # UTF-8 has at most 4 bytes a character; after so many tokens it is no character


class TextCodec:
    """Tokenizer and chat template of one model."""

    def __init__(self, folder: Path) -> None:
        if not any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
        ):
            raise ModelFault("the model directory has no tokenizer (tokenizer.json)")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ModelFault(f"the tokenizer cannot be loaded ({type(error).__name__})") from error
        core = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(core, Tokenizer):
            raise ModelFault("the tokenizer has no tokenizer.json: only fast tokenizers are served")
        core.no_truncation()
        core.no_padding()
        self.core = core
        self.hf = tokenizer
        self.has_chat_template = bool(tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model's own post-processor adds."""
        return self.core.encode(text).ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """(token ids, segment ids) of a pair, as a cross-encoder takes it."""
        encoding = self.core.encode(first, second)
        return encoding.ids, encoding.type_ids

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Refusal if the model has no chat template, or its template refuses these messages."""
        if not self.has_chat_template:
            raise Refusal("invalid_request", "this model has no chat template; use /v1/completions", param="messages")
        try:
            return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            # The template's own words ("roles must alternate") are written by the model's maker, not by the caller.
            what = str(error)[:200] if isinstance(error, jinja2.TemplateRuntimeError) else "it is not valid"
            raise Refusal("invalid_request", f"the model's chat template refused: {what}", param="messages") from error

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The template writes special tokens itself, so none are added."""
        return self.core.encode(self.render_chat(messages), add_special_tokens=False).ids

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """(text, its UTF-8 bytes) of one token alone, for logprobs. Half a character shows as U+FFFD."""
        text = self.core.decode([token], skip_special_tokens=False)
        return text, list(text.encode())


class TextStream:
    """The text of one sequence, piece by piece; a character is given out once all its bytes are there.

    Each piece is the difference of two decodings that begin at the same earlier token, so that what a decoder does at
    the start of a text (strip a space) happens in both. The tokenizers library has a `DecodeStream` for this, but it
    raises on malformed bytes ("Invalid prefix encountered"), which a model is free to generate.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int]) -> None:
        self._core = codec.core
        self._waiting = 0  # of `_ids`, the last so many are not part of `_shown` yet
        self._ids, self._shown = self._window(prompt)

    def push(self, token: int) -> str:
        self._ids.append(token)
        self._waiting += 1
        text = self._decode(self._ids)
        if text.endswith(_BROKEN) and self._waiting < _CHARACTER_TOKENS_MAX:
            return ""
        if text.startswith(self._shown):
            piece = text[len(self._shown) :]
        else:  # bytes that had been shown as broken have become something else
            piece = text[_common_length(text, self._shown) :]
        self._waiting, self._shown = 0, text
        if len(self._ids) > _DECODED_TOKENS_MAX:
            self._ids, self._shown = self._window(self._ids)
        return piece

    def _window(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """The last few tokens and their text, beginning at a whole character: a byte-fallback decoder gives up on a
        whole run of bytes when its first ones are missing."""
        for size in range(_PRIMING_TOKENS, _PRIMING_TOKENS + 4):
            text = self._decode(ids[-size:])
            if _BROKEN not in text:
                return list(ids[-size:]), text
        return list(ids[-_PRIMING_TOKENS:]), self._decode(ids[-_PRIMING_TOKENS:])

    def _decode(self, ids: Sequence[int]) -> str:
        return self._core.decode(ids, skip_special_tokens=True) if ids else ""


def _common_length(a: str, b: str) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def pack_float32(vector: Sequence[float]) -> str:
    """OpenAI's base64 embedding: little-endian float32."""
    packed = array.array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()
