"""Many adapters on one base: each token of a batch gets its own sequence's low-rank pair added, the base runs once.

The base's product is shared by all sequences; an adapter's part is computed for its own tokens only, so a batch that
mixes fifty adapters costs the base once and each pair on few rows (the idea of Punica, arXiv 2310.18547, and S-LoRA,
2311.03285). Adapters are read when first asked for; the least recently used leave when `nbytes_max` is reached.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tidegate.domain.errors import Refusal
from tidegate.torch_engine.adapter import Adapter, read

Group = tuple[Adapter, torch.Tensor | None]
"""An adapter and the places of its tokens in the batch; None when all are its own."""


class LoraLinear(nn.Module):
    """A linear layer of the base, by reference, and what the current batch adds to it."""

    def __init__(self, base: nn.Linear, name: str, lora: "Lora") -> None:
        super().__init__()
        self.base, self._name, self._lora = base, name, lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, tokens, in] → [1, tokens, out]."""
        out: torch.Tensor = self.base(x)
        for adapter, places in self._lora.groups:
            pair = adapter.pairs.get(self._name)
            if pair is None:
                continue
            if places is None:
                out += (x @ pair.down.T) @ pair.up.T
            else:
                out[0].index_add_(0, places, (x[0, places] @ pair.down.T) @ pair.up.T)
        return out

    @property
    def weight(self) -> torch.Tensor:
        """Architectures look at it for dtype and device."""
        return self.base.weight


class Lora:
    """The adapters of one engine. `get` may be called from any thread; `begin` and `end` from the worker's."""

    def __init__(self, model: Any, nbytes_max: int) -> None:
        self.groups: Sequence[Group] = ()
        self.nbytes_max = nbytes_max
        self.nbytes = 0
        self._device, self._dtype = model.device, model.dtype
        self._known: OrderedDict[str, Adapter] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()
        head = model.get_output_embeddings()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self._shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoraLinear(layer, name, self))

    def take(self, digest: str, folder: Path) -> Adapter:
        """The adapter, read if it is not here, kept until `give_back`. ModelFault for one that does not fit this base;
        Refusal("capacity") while all that is here is in use.
        """
        with self._lock:
            adapter = self._known.get(digest)
            if adapter is None:
                adapter = self._place(read(folder, digest, self._shapes, self._dtype))
            self._known.move_to_end(digest)
            self._users[digest] = self._users.get(digest, 0) + 1
            return adapter

    def give_back(self, adapter: Adapter) -> None:
        with self._lock:
            self._users[adapter.digest] = max(0, self._users.get(adapter.digest, 0) - 1)

    def begin(self, wanted: Sequence[Adapter | None]) -> None:
        """The adapter of each token of the batch that comes next."""
        places: dict[Adapter, list[int]] = {}
        for place, adapter in enumerate(wanted):
            if adapter is not None:
                places.setdefault(adapter, []).append(place)
        self.groups = [
            (adapter, None if len(its) == len(wanted) else torch.tensor(its, device=self._device))
            for adapter, its in places.items()
        ]

    def end(self) -> None:
        self.groups = ()

    def forget(self) -> None:
        """Asleep: nothing is in use, and what was read is read again when asked for."""
        with self._lock:
            self._known.clear()
            self._users.clear()
            self.nbytes = 0

    def _place(self, adapter: Adapter) -> Adapter:
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
