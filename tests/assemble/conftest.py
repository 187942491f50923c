"""The `run` fixture: tells a story to a platform of its own, then sees it end."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.assemble.live import StandIn, Story, platform
from tidegate.assemble import machine


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Story], None]:
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "BuiltinDriver", StandIn)

    def runner(story: Story) -> None:
        async def main() -> None:
            async with platform(tmp_path) as live:
                await story(live)

        asyncio.run(main())

    return runner
