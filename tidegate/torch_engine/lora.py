"""Many adapters on one base: each token of a batch gets its own sequence's low-rank pair added, the base runs once.

The base's product is shared by all sequences (the idea of Punica, arXiv 2310.18547, and S-LoRA, 2311.03285). The pairs
of a batch's adapters lie stacked by slots along their rank, so that a layer adds all of them with two matrix products
and a mask, however many they are: on a CPU in bfloat16, 16 adapters one by one took six times as long. An adapter moves
into a slot when it joins the batch and stays while no other needs it.

Adapters are read when first asked for; the least recently used leave when `nbytes_max` is reached.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tidegate.domain.errors import Refusal
from tidegate.torch_engine.adapter import Adapter, Pair, read


class LoraLinear(nn.Module):
    """A linear layer of the base, by reference, and the stacked pairs of the batch: ``down`` [width, in], ``up``
    [width, out], where width is slots × rank.
    """

    def __init__(self, base: nn.Linear, lora: "Lora") -> None:
        super().__init__()
        self.base, self._lora = base, lora
        self.down = self.up = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, tokens, in] → [1, tokens, out]."""
        out: torch.Tensor = self.base(x)
        mask = self._lora.mask
        if mask is not None and self.down.numel():
            width = mask.shape[1]
            out[0].addmm_((x[0] @ self.down[:width].T) * mask, self.up[:width])
        return out

    def empty(self) -> None:
        self.down = self.up = torch.empty(0)

    def put(self, pair: Pair | None, slot: int, slots: int, rank: int) -> None:
        """An adapter's pair at `slot`; zeros where its own rank is less or it has none. The stacks are made for the
        first adapter that has one here.
        """
        if not self.down.numel():
            if pair is None:
                return
            self.down = self.base.weight.new_zeros(slots * rank, self.base.in_features)
            self.up = self.base.weight.new_zeros(slots * rank, self.base.out_features)
        start, own = slot * rank, 0 if pair is None else pair.down.shape[0]
        if pair is not None:
            self.down[start : start + own] = pair.down
            self.up[start : start + own] = pair.up.T
        self.down[start + own : start + rank] = 0
        self.up[start + own : start + rank] = 0

    @property
    def weight(self) -> torch.Tensor:
        """Architectures look at it for dtype and device."""
        return self.base.weight


class Lora:
    """The adapters of one engine, at most `slots` of them in one batch. `take` and `give_back` may be called from any
    thread, `begin` and `end` from the worker's.
    """

    def __init__(self, model: Any, nbytes_max: int, slots: int) -> None:
        self.mask: torch.Tensor | None = None  # [tokens, width] of the batch; None: the base alone
        self.nbytes_max = nbytes_max
        self.nbytes = 0  # of the adapters that were read; the stacks take `slots` times one of them beside
        self._device, self._dtype = model.device, model.dtype
        self._known: OrderedDict[str, Adapter] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()
        self._slots: list[Adapter | None] = [None] * slots
        self._rank = 0
        head = model.get_output_embeddings()
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self._layers = {name: LoraLinear(layer, self) for name, layer in linear.items()}
        self._shapes = {name: (layer.out_features, layer.in_features) for name, layer in linear.items()}
        for name, layer in self._layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    def take(self, digest: str, folder: Path) -> Adapter:
        """The adapter, read if it is not here, kept until `give_back`. ModelFault for one that does not fit this base;
        Refusal("capacity") while all that is here is in use.
        """
        with self._lock:
            adapter = self._known.get(digest)
            if adapter is None:
                adapter = self._keep(read(folder, digest, self._shapes, self._dtype))
            self._known.move_to_end(digest)
            self._users[digest] = self._users.get(digest, 0) + 1
            return adapter

    def give_back(self, adapter: Adapter) -> None:
        with self._lock:
            self._users[adapter.digest] = max(0, self._users.get(adapter.digest, 0) - 1)

    def begin(self, wanted: Sequence[Adapter | None]) -> None:
        """The adapter of each token of the batch that comes next."""
        active = {adapter: None for adapter in wanted if adapter is not None}
        if not active:
            self.mask = None
            return
        self._place(list(active))
        slot_of = {adapter: slot for slot, adapter in enumerate(self._slots) if adapter in active}
        width = (max(slot_of.values()) + 1) * self._rank
        slots = torch.tensor([slot_of.get(a, -1) if a is not None else -1 for a in wanted], device=self._device)
        owners = torch.arange(width, device=self._device) // self._rank
        self.mask = (owners[None, :] == slots[:, None]).to(self._dtype)

    def end(self) -> None:
        self.mask = None

    def forget(self) -> None:
        """Asleep: nothing is in use, and what was read is read again when asked for."""
        with self._lock:
            self._known.clear()
            self._users.clear()
            self.nbytes, self._rank = 0, 0
            self._slots = [None] * len(self._slots)
            for layer in self._layers.values():
                layer.empty()

    def _place(self, active: Sequence[Adapter]) -> None:
        """Gives each of the batch's adapters a slot; those that are not in the batch make room."""
        rank = max(pair.down.shape[0] for adapter in active for pair in adapter.pairs.values())
        if rank > self._rank:
            self._rank = rank
            self._slots = [None] * len(self._slots)
            for layer in self._layers.values():
                layer.empty()
        here, staying = set(self._slots), set(active)
        free = [slot for slot, adapter in enumerate(self._slots) if adapter not in staying]
        for adapter in active:
            if adapter not in here:
                slot = free.pop(0)
                self._slots[slot] = adapter
                for name, layer in self._layers.items():
                    layer.put(adapter.pairs.get(name), slot, len(self._slots), self._rank)

    def _keep(self, adapter: Adapter) -> Adapter:
        if adapter.nbytes > self.nbytes_max:
            raise Refusal(
                "endpoint_failed",
                f"the adapter has {adapter.nbytes} bytes, its base allows {self.nbytes_max} for all of them",
            )
        for digest in [d for d in self._known if not self._users.get(d)]:
            if self.nbytes + adapter.nbytes <= self.nbytes_max:
                break
            self.nbytes -= self._known.pop(digest).nbytes
        if self.nbytes + adapter.nbytes > self.nbytes_max:
            raise Refusal("capacity", "every adapter that is in memory is in use", retry_after_ms=1_000)
        moved = Adapter(
            adapter.digest,
            {name: type(p)(p.down.to(self._device), p.up.to(self._device)) for name, p in adapter.pairs.items()},
            adapter.nbytes,
        )
        self._known[adapter.digest] = moved
        self.nbytes += adapter.nbytes
        return moved
