"""Fit a small Llama to conversations: Muon for the matrices, AdamW for the rest, loss on answers only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.dialogue import Dialogues
from demo_training.tokenizer import CONTEXT_TOKENS_MAX, VOCAB_SIZE, encode

POOL_CONVERSATIONS, BATCH_TOKENS_MAX = 256, 4096
OPENING_TOKENS, OPENING_SHARE = 12, 0.5
WARMUP_STEPS = 20
MUON_RATE, ADAM_RATE, RESUMED_RATE_SCALE = 0.02, 0.004, 0.5


def build(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 1.25 million parameters; four query and two key-value heads of 32 dimensions, embeddings tied."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS_MAX,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(dialogues: Dialogues, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, answer mask), both [conversations, tokens]; conversations of like length go together to save padding."""
    while True:
        talks = list(islice(dialogues, POOL_CONVERSATIONS))
        # Which answer to give is decided in its first words and is the harder half to learn: many talks stop there.
        cuts = [OPENING_TOKENS if dialogues.dice.random() < OPENING_SHARE else None for _ in talks]
        pool = sorted(
            (encode(tokenizer, *pair) for pair in zip(talks, cuts, strict=True)), key=lambda pair: len(pair[0])
        )
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for talk in pool:
            if (len(groups[-1]) + 1) * len(talk[0]) > BATCH_TOKENS_MAX:
                groups.append([])
            groups[-1].append(talk)
        dialogues.dice.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            mask = torch.zeros((len(group), width), dtype=torch.bool)
            for row, (talk_ids, talk_mask) in enumerate(group):
                ids[row, : len(talk_ids)] = torch.tensor(talk_ids)
                mask[row, : len(talk_mask)] = torch.tensor(talk_mask)
            yield ids, mask


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over answer tokens. Padding is on the right, where causal attention never looks."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[mask[:, 1:]])
    return functional.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]])


def fit(
    dialogues: Dialogues, tokenizer: PreTrainedTokenizerFast, steps: int, start: LlamaForCausalLM | None = None
) -> LlamaForCausalLM:
    """A trained model in bfloat16. Rate: linear warm-up, then linear to zero; lower when it goes on from `start`."""
    model = build(tokenizer) if start is None else start.float()
    scale = 1.0 if start is None else RESUMED_RATE_SCALE
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE * scale, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_RATE * scale, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def shape(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    started, tokens, running = time.monotonic(), 0, None
    model.train()
    for step, (ids, mask) in enumerate(islice(batches(dialogues, tokenizer), steps)):
        loss = answer_loss(model, ids, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            label = f"[{dialogues.corpus.name}] step {step}/{steps}"
            print(f"{label} loss {running:.3f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True)
    return model.to(torch.bfloat16).eval()
