"""The forward passes: a flat batch through a decoder, a padded batch through an encoder."""

from collections.abc import Sequence
from typing import Any

import torch

from tidegate.torch_engine.adapter import Adapter
from tidegate.torch_engine.attention import Chunk, FlatBatch, RowAttention
from tidegate.torch_engine.faults import EngineError, ModelFault
from tidegate.torch_engine.kv import KvShape, KvStore
from tidegate.torch_engine.lora import Lora

CANARY_TOKENS = 8


def kv_shape(config: Any, dtype: torch.dtype) -> KvShape:
    """Read off the config; ModelFault for an architecture that says these things elsewhere."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        heads = int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        return KvShape(int(text.num_hidden_layers), kv_heads, head_dim, dtype)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ModelFault("config.json does not say how many layers and heads there are") from error


class GenerativeRunner:
    """Owner of the forward. Runs on the step loop's thread only."""

    def __init__(self, model: Any, store: KvStore, lora: Lora | None = None) -> None:
        self.model = model
        self.store = store
        self.lora = lora
        self.attention = RowAttention(store)

    def warm_up(self) -> None:
        """One tiny forward: proves that every layer's attention is ours. ModelFault where it is not."""
        self.attention.layers_seen = 0
        try:
            self._prefill_and_decode()
        except EngineError:
            raise
        except Exception as error:
            raise ModelFault(
                f"architecture {type(self.model).__name__} does not run here ({type(error).__name__})"
            ) from error
        if self.attention.layers_seen != 2 * self.store.shape.layers:
            raise ModelFault(f"architecture {type(self.model).__name__} has layers without plain attention: not served")

    @torch.inference_mode()
    def step(
        self, tokens: Sequence[int], batch: FlatBatch, sampled: Sequence[int], adapters: Sequence[Adapter | None] = ()
    ) -> torch.Tensor:
        """Logits [len(sampled), vocab] at those places of the flat batch. `tokens` are the batch's input ids,
        `adapters` what each of them asks for (left out: the base alone).
        """
        batch.prepare(self.store)
        device = self.store.device
        self.attention.batch = batch
        if self.lora is not None:
            self.lora.begin(adapters)
        try:
            if not sampled:  # chunks of a prompt that goes on: K and V are written, nobody reads the logits
                self.model.base_model(
                    input_ids=torch.tensor([tokens], device=device), position_ids=batch.positions, use_cache=False
                )
                return torch.empty(0)
            out = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=batch.positions,
                use_cache=False,
                # Of several devices the last has them: an index on the CPU is good for any.
                logits_to_keep=torch.tensor(sampled, device=device if len(self.store.parts) == 1 else None),
            )
        finally:
            self.attention.batch = None
            if self.lora is not None:
                self.lora.end()
        return out.logits[0]  # type: ignore[no-any-return]

    def canary(self, prompt: Sequence[int]) -> list[int]:
        """The greedy token after each of the last `CANARY_TOKENS` places of `prompt`. Needs one free row.

        One forward, as every activation waits for it: each place passes through every weight, and reads the KV cache.
        """
        row, held = self.store.take(), len(prompt)
        self.store.grow(0, held)
        try:
            places = range(max(0, held - CANARY_TOKENS), held)
            logits = self.step(prompt, FlatBatch([], [], [Chunk(row, 0, held, 0)]), list(places))
            return [int(token) for token in logits.argmax(-1)]
        finally:
            self.store.release(row, held)

    def _prefill_and_decode(self) -> None:
        row, held = self.store.take(), 3
        self.store.grow(0, held)
        try:
            self.step([0, 0], FlatBatch([], [], [Chunk(row, 0, 2, 0)]), [1])
            self.step([0], FlatBatch([row], [2], []), [0])
        finally:
            self.store.release(row, held)


class EncoderRunner:
    """An encoder with or without a classification head; texts of one call are padded to their longest."""

    def __init__(self, model: Any, pad_token: int, pooling: str | None, normalize: bool, device: torch.device) -> None:
        self.model = model
        self.pad_token = pad_token
        self.pooling = pooling  # None: the model has a head, logits are returned
        self.normalize = normalize
        self.device = device

    @torch.inference_mode()
    def encode(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
        """Token ids (and segment ids, for pairs) -> float32 [texts, dim] (embedding) or [texts, labels] (logits)."""
        longest = max(len(ids) for ids in texts)
        ids = torch.full((len(texts), longest), self.pad_token)
        mask = torch.zeros(len(texts), longest, dtype=torch.long)
        segments = torch.zeros(len(texts), longest, dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            mask[i, : len(text)] = 1
            if types is not None:
                segments[i, : len(text)] = torch.tensor(types[i])
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if types is not None and getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segments.to(self.device)
        out = self.model(**inputs)
        if self.pooling is None:
            return out.logits.float()  # type: ignore[no-any-return]
        pooled = pool(out.last_hidden_state.float(), inputs["attention_mask"], self.pooling)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def pool(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """hidden [texts, tokens, dim], mask [texts, tokens] -> [texts, dim]; the modes of sentence-transformers."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    match how:
        case "cls":
            return hidden[:, 0]
        case "lasttoken":
            last = mask.sum(1) - 1
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        case "max":
            return hidden.masked_fill(weights == 0, float("-inf")).amax(1)
        case "mean":
            return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    raise ModelFault(f"pooling mode {how} is not served: mean, cls, max or lasttoken is")
