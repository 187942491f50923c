"""What the generative API says: whole answers, and the events of a stream. Runs on the server's thread.

A stream's events are numbered with the completion tokens generated so far (``id: N``), over all choices: whoever
relays the stream knows what an aborted one delivered from the last number, without parsing anything.
"""

import os
import time
from typing import Any

from tidegate.torch_engine.http1 import Exchange
from tidegate.torch_engine.sequence import Delta, GenerationJob, Token
from tidegate.torch_engine.text import TextCodec
from tidegate.wire import openai
from tidegate.wire.openai import SSE_CONTENT_TYPE, SSE_DONE, encode, sse_event, usage


class Answer:
    """Follows one job and writes its answer. `chat` chooses between the two shapes of OpenAI's API."""

    def __init__(
        self,
        exchange: Exchange,
        job: GenerationJob,
        codec: TextCodec,
        request: openai.ChatRequest | openai.CompletionRequest,
    ) -> None:
        self.exchange = exchange
        self.job = job
        self._codec = codec
        self._chat = isinstance(request, openai.ChatRequest)
        self._model = request.model
        options = request.stream_options or openai.StreamOptions()
        self._usage_last = bool(options.include_usage)
        self._usage_always = bool(options.continuous_usage_stats)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{os.urandom(12).hex()}"
        self._created = int(time.time())
        self._prompt_tokens = sum(map(len, job.prompts))
        self._completion_tokens = 0
        count = len(job.prompts) * job.choices
        self._begun = [False] * count
        self._held: list[list[Token]] = [[] for _ in range(count)]  # tokens with logprobs whose text is still held
        self._offsets = [0] * count
        self._whole: list[Delta | None] = [None] * count
        object_name = (
            ("chat.completion.chunk" if job.streaming else "chat.completion") if self._chat else "text_completion"
        )
        # Everything of an event that never changes, encoded once.
        self._frame = encode({"id": self._id, "object": object_name, "created": self._created, "model": self._model})[
            :-1
        ]

    @property
    def _headers(self) -> dict[str, str]:
        told = {"x-tidegate-prompt-tokens": str(self._prompt_tokens), "x-tidegate-cached-tokens": "0"}
        if self.job.adapter is not None:  # the gateway checks that it is the one it asked for
            told["x-tidegate-adapter"] = self.job.adapter.digest
        return told

    def on_delta(self, delta: Delta) -> None:
        if not self.job.streaming:
            self._completion_tokens += len(delta.tokens)
            self._whole[delta.choice] = delta
            return
        if not self.exchange.started:
            self.exchange.start(200, SSE_CONTENT_TYPE, {**self._headers, "cache-control": "no-cache"})
        for token in delta.tokens:
            self._completion_tokens += 1
            self._held[delta.choice].append(token)
        text = "".join(token.text for token in delta.tokens)
        if not text and not delta.finish:
            return
        tokens, self._held[delta.choice] = self._held[delta.choice], []
        choice: dict[str, Any] = {"index": delta.choice}
        if self._chat:
            role = {} if self._begun[delta.choice] else {"role": "assistant"}
            choice["delta"] = {**role, "content": text} if text or role else {}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(delta.choice, tokens)
        choice["finish_reason"] = delta.finish
        self._begun[delta.choice] = True
        self._event([choice], with_usage=self._usage_always)

    def on_end(self) -> None:
        """All choices are done (or dropped, when the peer left: then nothing can be written any more)."""
        if self.exchange.gone:
            return
        if not self.job.streaming:
            self.exchange.respond(200, self._body(), self._headers)
            return
        if self._usage_last:
            self._event([], with_usage=True)
        self.exchange.end(SSE_DONE)

    def _event(self, choices: list[dict[str, Any]], *, with_usage: bool) -> None:
        data = self._frame + b',"choices":' + encode(choices)
        if with_usage:
            data += b',"usage":' + encode(usage(self._prompt_tokens, self._completion_tokens))
        elif self._usage_last:
            data += b',"usage":null'
        self.exchange.write(sse_event(data + b"}", self._completion_tokens))

    def _body(self) -> bytes:
        choices = []
        for i, delta in enumerate(self._whole):
            assert delta is not None, "a job ended before its choices"
            text = "".join(token.text for token in delta.tokens)
            choice: dict[str, Any] = {"index": i}
            if self._chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choice["logprobs"] = self._logprobs(i, list(delta.tokens))
            choice["finish_reason"] = delta.finish
            choices.append(choice)
        counted = encode(usage(self._prompt_tokens, self._completion_tokens))
        return self._frame + b',"choices":' + encode(choices) + b',"usage":' + counted + b"}"

    # ---- logprobs ---------------------------------------------------------------------------------------------------

    def _logprobs(self, choice: int, tokens: list[Token]) -> dict[str, Any] | None:
        if self.job.params.top_logprobs is None:
            return None
        return self._chat_logprobs(tokens) if self._chat else self._completion_logprobs(choice, tokens)

    def _chat_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            assert token.logprobs is not None
            top = [self._entry(t, logprob) for t, logprob in token.logprobs.top]
            content.append({**self._entry(token.id, token.logprobs.chosen), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, encoded = self._codec.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": encoded}

    def _completion_logprobs(self, choice: int, tokens: list[Token]) -> dict[str, Any]:
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            assert token.logprobs is not None
            out["tokens"].append(self._codec.token_text(token.id)[0])
            out["token_logprobs"].append(token.logprobs.chosen)
            out["top_logprobs"].append({self._codec.token_text(t)[0]: value for t, value in token.logprobs.top} or None)
            out["text_offset"].append(self._offsets[choice])
            self._offsets[choice] += len(token.text)
        return out
