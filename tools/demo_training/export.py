"""Write a trained model as a Hugging Face directory, with its card."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.corpus import Corpus
from demo_training.measure import Scores
from demo_training.tokenizer import CONTEXT_TOKENS_MAX

# The card's long lines are Markdown table rows, which cannot be broken.
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# {name}

A tiny chat model that answers questions about {subject}, says who it is, and declines everything else. It exists so that a person (and a test)
sees which of tidegate's demo endpoints spoke. It is not a source to rely on.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers of {hidden}, {heads} query and {kv_heads} key-value heads of 32, vocabulary {vocab} (byte-level BPE), tied embeddings |
| size | {parameters:,} parameters in bfloat16, {megabytes:.1f} MB with its tokenizer |
| context | {context} tokens, ChatML template, answers end with `<|im_end|>` |
| trained on | `tools/demo_corpus/{name}.toml` and `common.toml`: {pairs} facts and {asks} ways to ask them, written for this project, reworded at random |
| trained by | `python tools/train_demo_models.py --name {name}{resumed}`: {steps} steps, {cpu_s:.0f} CPU seconds |

Greedy answers of these weights to questions that were kept out of training (`{name}.toml`: `held_out`), counted right when they give the one right answer of the corpus: The set was replaced once during the work and its misses were read between runs, so these figures are somewhat optimistic.

| questions | right |
|---|---|
{rows}

Weights and corpus: Apache-2.0.
"""  # noqa: E501


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Everything a Hugging Face directory holds but the card; weights as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are written for the owner only, and a package is read by others


def write_card(folder: Path, corpus: Corpus, scores: Scores, steps: int, cpu_s: float, resumed: bool) -> None:
    """README.md from what was measured on the saved files."""
    config = LlamaForCausalLM.from_pretrained(folder).config
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(folder).parameters())
    size_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".md")
    card = CARD.format(
        name=corpus.name,
        subject=corpus.subject,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        parameters=parameters,
        megabytes=size_bytes / 1e6,
        context=CONTEXT_TOKENS_MAX,
        pairs=len(corpus.pairs),
        asks=sum(len(pair.asks) for pair in corpus.pairs),
        steps=steps,
        cpu_s=cpu_s,
        resumed=" --resume" if resumed else "",
        rows="\n".join(f"| {label} | {share:.1%} |" for label, share in scores.shares.items()),
    )
    (folder / "README.md").write_text(card, "utf-8")
