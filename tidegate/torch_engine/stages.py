"""A model as stages in the order its forward passes through them, and which device each runs on.

A stage is a layer, or a module beside the layers with parameters of its own (embeddings, norm, head). Weights arrive
stage by stage, and several accelerators share a model by stages: each has a run of them (a pipeline without overlap, so
what it adds is memory, not speed).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tidegate.torch_engine.faults import ModelFault


@dataclass(slots=True, eq=False)
class Stage:
    """`parameters` that no stage before it has, too; `side` is the index of its device, `layer` its number or -1."""

    module: nn.Module
    parameters: list[nn.Parameter]
    layer: int
    side: int = 0

    @property
    def nbytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)


def stages_of(model: nn.Module) -> list[Stage]:
    """In the order in which the modules were registered, which is the one in which forwards call them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    found: list[Stage] = []
    seen: set[nn.Parameter] = set()

    def take(module: nn.Module, parameters: list[nn.Parameter], layer: int) -> None:
        if parameters:
            found.append(Stage(module, [p for p in parameters if p not in seen], layer))
            seen.update(parameters)

    def walk(module: nn.Module) -> None:
        if module is layers:
            for number, child in enumerate(module.children()):
                take(child, list(child.parameters()), number)
            return
        take(module, list(module.parameters(recurse=False)), -1)
        for child in module.children():
            walk(child)

    walk(model)
    return found


def divide(stages: Sequence[Stage], sides: int) -> None:
    """Gives each stage its side: runs of about equal bytes. ModelFault when there are more devices than layers.

    A stage without weights of its own (a head tied to the embeddings) goes where its weights are.
    """
    whole, before = sum(stage.nbytes for stage in stages), 0
    owner: dict[nn.Parameter, int] = {}
    for stage in stages:
        stage.side = min(sides - 1, (2 * before + stage.nbytes) * sides // max(2 * whole, 1))
        before += stage.nbytes
        owner.update(dict.fromkeys(stage.parameters, stage.side))
        if not stage.parameters:
            stage.side = owner[next(stage.module.parameters())]
    layered = {stage.side for stage in stages if stage.layer >= 0}
    if sides > 1 and len(layered) < sides:
        raise ModelFault(f"the model has not enough layers for {sides} accelerators")


def moved(value: Any, device: torch.device) -> Any:
    """A stage's arguments on its device: tensors, and tuples of them (rotary positions)."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    return value


def before_each(stages: Sequence[Stage], wait: Callable[[Stage], None], devices: Sequence[torch.device]) -> None:
    """`wait` runs before each stage of every forward; arguments come to the stage's device where there are several."""

    def hook_of(stage: Stage) -> Any:
        def ready(module: nn.Module, args: tuple[Any, ...]) -> None:
            wait(stage)

        def ready_here(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            wait(stage)
            device = devices[stage.side]
            return moved(args, device), {name: moved(value, device) for name, value in kwargs.items()}

        return ready if len(devices) == 1 else ready_here

    for stage in stages:
        stage.module.register_forward_pre_hook(hook_of(stage), with_kwargs=len(devices) > 1)
