"""Train the four demo chat models of tidegate from the text in tools/demo_corpus, on two CPU cores, in minutes.

    python tools/train_demo_models.py [--name tides] [--out tidegate/demo_models] [--steps 1200]

Each model gets a byte-level BPE tokenizer of its own, a small Llama of about 1.25 million parameters and a ChatML
template, and is written as a Hugging Face directory of safetensors in bfloat16. Training stops after a fixed
number of seeded steps, and loss is taken on answers only. The held-out paraphrases are never trained on; the
accuracy printed (and put into the model card) is the share of them whose greedy answer is the right one of the
corpus.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from demo_training import export, measure
from demo_training.corpus import NAMES, Corpus, load
from demo_training.dialogue import Dialogues
from demo_training.fit import fit
from demo_training.tokenizer import train_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS_DIR = Path(__file__).resolve().parent / "demo_corpus"
OUT_DIR = Path(__file__).resolve().parent.parent / "tidegate" / "demo_models"


def train_one(corpus: Corpus, out: Path, steps: int, seed: int, start: Path | None) -> None:
    """Train, save and measure one model, from random weights or from those in the folder `start`."""
    random.seed(seed)
    torch.manual_seed(seed)
    dialogues = Dialogues(corpus, seed)
    tokenizer = train_tokenizer(dialogues) if start is None else PreTrainedTokenizerFast.from_pretrained(start)
    earlier = None if start is None else LlamaForCausalLM.from_pretrained(start)
    started = time.process_time()
    model = fit(dialogues, tokenizer, steps, earlier)
    cpu_s = time.process_time() - started
    folder = out / corpus.name
    export.save(model, tokenizer, folder)
    scores = measure.scores(corpus, folder)
    export.write_card(folder, corpus, scores, steps, cpu_s, start is not None)
    print(
        f"[{corpus.name}] {cpu_s:.0f} CPU seconds; " + "; ".join(f"{k} {v:.1%}" for k, v in scores.shares.items()),
        flush=True,
    )
    for question, wanted, got in scores.misses:
        print(f"    {question!r}\n      wanted {wanted!r}\n      got    {got!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tidegate's demo models.")
    parser.add_argument("--name", choices=NAMES, help="one model only (default: all four)")
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the weights in --out instead of from random ones"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    for name in [args.name] if args.name else NAMES:
        train_one(load(CORPUS_DIR, name), args.out, args.steps, args.seed, args.out / name if args.resume else None)


if __name__ == "__main__":
    main()
