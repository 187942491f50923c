"""From a parsed chat or completion request to a job. Everything a request can get wrong is refused here."""

from collections.abc import Sequence

from tidegate.domain.errors import Refusal
from tidegate.torch_engine.model import Loaded
from tidegate.torch_engine.runner import GenerativeRunner
from tidegate.torch_engine.sampler import SamplingParams
from tidegate.torch_engine.sequence import GenerationJob
from tidegate.wire import openai
from tidegate.wire.openai import ChatRequest, CompletionRequest

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's default of /v1/completions; chat goes on to the end of the context


def chat_job(body: bytes, model: Loaded) -> tuple[ChatRequest, GenerationJob]:
    """Raises Refusal."""
    request = openai.parse(ChatRequest, body)
    messages = [{"role": _role(m.role), "content": m.text} for m in request.messages]
    prompt = model.codec.encode_chat(messages)
    top = (request.top_logprobs or 0) if request.logprobs else None
    return request, _job(request, [prompt], model, request.max_completion_tokens or request.max_tokens, top)


def completion_job(body: bytes, model: Loaded) -> tuple[CompletionRequest, GenerationJob]:
    """Raises Refusal."""
    request = openai.parse(CompletionRequest, body)
    prompts = [p if isinstance(p, list) else model.codec.encode(p) for p in openai.texts(request.prompt)]
    for prompt in prompts:
        if any(not 0 <= token < model.vocab for token in prompt):
            raise Refusal("invalid_request", "prompt: a token id is outside the vocabulary", param="prompt")
    return request, _job(request, prompts, model, request.max_tokens or COMPLETION_TOKENS_DEFAULT, request.logprobs)


def _role(role: str) -> str:
    """`developer` is OpenAI's newer word for `system`; templates know the older one."""
    return "system" if role == "developer" else role


def _job(
    request: openai.Sampling,
    prompts: Sequence[list[int]],
    model: Loaded,
    tokens_max: int | None,
    top_logprobs: int | None,
) -> GenerationJob:
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    if any(not prompt for prompt in prompts):
        raise Refusal("invalid_request", f"{param}: the prompt has no tokens", param=param)
    longest = max(map(len, prompts))
    left = model.context_tokens_max - longest
    if left < 1 or (tokens_max or 1) > left:
        raise Refusal(
            "context_length_exceeded",
            f"this model's context is {model.context_tokens_max} tokens: the prompt has {longest}, "
            f"max_tokens asks for {tokens_max or 1}",
            param=param,
        )
    choices = request.n or 1
    _fits_at_all(model, choices, longest)
    params = _params(request, model, tokens_max or left, top_logprobs)
    return GenerationJob(list(prompts), choices, params, bool(request.stream))


def _fits_at_all(model: Loaded, choices: int, prompt_tokens: int) -> None:
    """All choices of a prompt start together; a group that never fits would wait for ever."""
    assert isinstance(model.runner, GenerativeRunner)
    store = model.runner.store
    if choices > model.slots or choices * store.shape.row_bytes(prompt_tokens + 1) > store.plan.bytes_max:
        raise Refusal("invalid_request", "n: so many choices of this prompt do not fit this replica at once", param="n")


def _params(request: openai.Sampling, model: Loaded, tokens_max: int, top_logprobs: int | None) -> SamplingParams:
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if any(token >= model.vocab for token in bias):
        raise Refusal("invalid_request", "logit_bias: a token id is outside the vocabulary", param="logit_bias")
    defaults = model.defaults
    top_k = defaults.top_k if request.top_k is None else request.top_k
    return SamplingParams(
        max_tokens=tokens_max,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=max(0, top_k),  # -1 is "off" in vLLM's words
        seed=request.seed,
        stops=request.stops,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple(bias.items()),
        top_logprobs=top_logprobs,
        ignore_eos=bool(request.ignore_eos),
    )
