"""transformers, imported without what one process on one device never uses: torch's compiler and torch.distributed.

transformers marks functions for the compiler and knows sharded tensors, and torch loads both, sympy included, at the
mark: a third of the CPU time of its import, which is most of what a new platform's first question waits for. Nothing
here is compiled or sharded. So while transformers is imported the marks are a stand-in's, which hands each function
back, and transformers is told that there is no torch.distributed. Afterwards `torch._dynamo` is the real one again,
loaded by whoever asks for it. Relies on torch 2.13 and transformers 5; with others `template` imports all as usual.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


def _mark(function: Callable[..., Any] | None = None, **_: object) -> Any:
    """A decorator with or without arguments that changes nothing."""
    return _mark if function is None else function


class _StandIn(ModuleType):
    """Has every mark; its submodules are the real ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(COMPILER)
        self.__path__ = [str(folder)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _mark


@contextlib.contextmanager
def light() -> Iterator[None]:
    """For a block that imports transformers, at once or in parts."""
    import torch

    if COMPILER in sys.modules:  # loaded by torch itself or a plug-in of its: nothing is left to save
        yield
        return
    sys.modules[COMPILER] = _StandIn(Path(torch.__file__).parent / "_dynamo")
    disable = torch.compiler.disable
    torch.compiler.disable = _mark  # type: ignore[assignment]
    try:
        from transformers import utils
        from transformers.utils import import_utils

        for module in (utils, import_utils):
            module.is_torch_distributed_available = _no  # type: ignore[attr-defined]
        yield
    finally:
        torch.compiler.disable = disable
        del sys.modules[COMPILER]
        torch.__dict__.pop("_dynamo", None)  # the next to ask finds the real one


def _no() -> bool:
    return False
