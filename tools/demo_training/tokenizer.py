"""A byte-level BPE tokenizer with a ChatML template: any UTF-8 text can be encoded, and none of it is lost."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo_training.dialogue import Dialogues

VOCAB_SIZE = 2048
CONTEXT_TOKENS_MAX = 512
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Content may be a string or OpenAI's list of parts; parts that are not text are skipped.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + ('system' if message['role'] == 'developer' else message['role']) + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(dialogues: Dialogues, conversations: int = 3000) -> PreTrainedTokenizerFast:
    """Learn merges from made-up conversations and every answer. Deterministic for a seeded source."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for _ in range(conversations) for message in dialogues.conversation()]
    tokenizer.train_from_iterator(texts + ["system\n", "user\n", "assistant\n"] * 500, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=[START],
        model_max_length=CONTEXT_TOKENS_MAX,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], answer_tokens_max: int | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation as the chat template writes it, and which are answers (end mark included).

    With `answer_tokens_max` the conversation breaks off inside its last answer.
    """
    ids: list[int] = []
    answer: list[bool] = []
    last = 0
    for message in messages:
        head = tokenizer.encode(f"{START}{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + STOP, add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        is_answer = message["role"] == "assistant"
        last = len(ids) + len(head) if is_answer else last
        ids += head + body + tail
        answer += [False] * len(head) + [is_answer] * len(body) + [False] * len(tail)
    end = CONTEXT_TOKENS_MAX
    if answer_tokens_max is not None:
        end = min(end, last + answer_tokens_max)
    return ids[:end], answer[:end]
