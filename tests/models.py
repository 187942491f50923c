"""Random-weight models in Hugging Face layout, made on the fly: Llama, Qwen2, BERT embeddings, BERT classifier.

Deterministic by their arguments and cached in the machine's temporary folder, so that a test pays for each once.
Needs torch and transformers; import it inside tests that `pytest.importorskip("torch")`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYOUT_VERSION = 4  # part of the cache key: bump it when this file writes something else

_WORDS = (
    "the a of to and in is it you that he was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use word how said an each she which do their time if will "
    "way about many then them would write like so these her long make thing see him two has look more day could go "
    "come did my sound no most number who over know water than call first people may down side been now find any new "
    "work part take get place made live where after back little only round man year came show every good me give our"
)
_SPICE = "Grüße, naïve café — 東京 🌊 0123456789!"
_CORPUS = [" ".join(_WORDS.split()[i::k]) for k in range(1, 7) for i in range(k)] + [_SPICE]

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama(*, chat_template: bool = True, **shape: Any) -> Path:
    """A `LlamaForCausalLM` directory. `shape`: see `_decoder`."""
    return _decoder("llama", chat_template, shape)


def llama_of_words(**shape: Any) -> Path:
    """A `LlamaForCausalLM` directory in which every token is a word (``word0`` …): there is text at every step."""
    source = llama(**shape)

    def make(folder: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(WordLevel({f"word{i}": i for i in range(shape["vocab"])}, unk_token="word0"))
        words.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, folder / name)

    return _cached("llama-words", shape, make)


def lora(base: Path, seed: int, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")) -> Path:
    """An adapter of `base` in PEFT's layout, strong enough to change what is said."""

    def make(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        dice = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, weight in load_file(base / "model.safetensors").items():
            layer = name.removesuffix(".weight")
            if layer.rpartition(".")[2] in targets:
                out, into = weight.shape
                for half, shape in (("A", (rank, into)), ("B", (out, rank))):
                    tensors[f"base_model.model.{layer}.lora_{half}.weight"] = torch.randn(shape, generator=dice) * 0.1
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return _cached("lora", {"base": base.name, "seed": seed, "rank": rank, "targets": list(targets)}, make)


def qwen2(*, chat_template: bool = True, **shape: Any) -> Path:
    """A `Qwen2ForCausalLM` directory; same `shape` as `llama`."""
    return _decoder("qwen2", chat_template, shape)


def bert_embedding(*, pooling: str = "mean", normalize: bool = True, hidden: int = 64, seed: int = 0) -> Path:
    """A sentence-transformers layout around a BERT; `pooling` is mean, cls or max."""

    def make(folder: Path) -> None:
        from transformers import BertModel

        _save_bert(folder, BertModel, hidden, seed, {})
        modules = ["", "1_Pooling"] + (["2_Normalize"] if normalize else [])
        names = ["Transformer", "Pooling", "Normalize"]
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{names[i]}"}
            for i, path in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        modes = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
        flags = {f"pooling_mode_{value}": key == pooling for key, value in modes.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": hidden, **flags}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))

    return _cached("bert-embedding", {"pooling": pooling, "normalize": normalize, "hidden": hidden, "seed": seed}, make)


def bert_classifier(*, labels: int = 3, hidden: int = 64, seed: int = 0) -> Path:
    """A `BertForSequenceClassification` directory with labels named label_0…"""

    def make(folder: Path) -> None:
        from transformers import BertForSequenceClassification

        names = {i: f"label_{i}" for i in range(labels)}
        extra = {"num_labels": labels, "id2label": names, "label2id": {v: k for k, v in names.items()}}
        _save_bert(folder, BertForSequenceClassification, hidden, seed, extra)

    return _cached("bert-classifier", {"labels": labels, "hidden": hidden, "seed": seed}, make)


def copy(model: Path, into: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(model, into / model.name))


def _decoder(family: str, chat_template: bool, shape: dict[str, Any]) -> Path:
    full = {
        "hidden": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "intermediate": 128,
        "vocab": 512,
        "context": 256,
        "dtype": "float32",
        "seed": 0,
        "tie": False,
    }
    unknown = shape.keys() - full.keys()
    assert not unknown, f"unknown shape: {unknown}"
    full |= shape
    return _cached(
        family, {**full, "chat": chat_template}, lambda folder: _save_decoder(family, folder, full, chat_template)
    )


def _save_decoder(family: str, folder: Path, shape: dict[str, Any], chat_template: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = _byte_level_bpe(min(shape["vocab"], 512) - 8)  # loading may add a token
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    if chat_template:
        fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
    config_type, model_type = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_type(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["context"],
        bos_token_id=None,
        eos_token_id=fast.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=fast.convert_tokens_to_ids("<|pad|>"),
        tie_word_embeddings=shape["tie"],
        initializer_range=0.2 if shape["hidden"] <= 128 else 0.02,  # spread logits: greedy must not hang on rounding
    )
    torch.manual_seed(shape["seed"])
    model_type(config).to(getattr(torch, shape["dtype"])).save_pretrained(folder)


def _save_bert(folder: Path, model_type: Any, hidden: int, seed: int, extra: dict[str, Any]) -> None:
    import torch
    from transformers import BertConfig, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=_wordpiece(),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        initializer_range=0.2,
        **extra,
    )
    torch.manual_seed(seed)
    model_type(config).save_pretrained(folder)


def _byte_level_bpe(vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    # Written out, not trained: training breaks ties in an order that differs from run to run.
    letters = sorted({c for line in _CORPUS for c in line if not c.isspace()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *_WORDS.split()]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _cached(name: str, arguments: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Made in a private folder and renamed into place: two test processes never see half a model."""
    import transformers

    key = json.dumps([LAYOUT_VERSION, transformers.__version__, name, arguments], sort_keys=True)
    root = Path(tempfile.gettempdir()) / f"tidegate-test-models-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    place = root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if place.exists():
        return place
    scratch = Path(tempfile.mkdtemp(dir=root))
    make(scratch)
    try:
        scratch.rename(place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(scratch)
    return place
