"""What verbs read on this machine, the configuration and other files: what is wrong with one is said in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cli.output import Problem

if TYPE_CHECKING:
    from tidegate.config import Config


def configured(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> "Config":
    """The configuration, options (`overrides`) last. Problem with each key that is refused, and why."""
    from tidegate.config import ConfigError, load

    try:
        return load(file, overrides)
    except ConfigError as error:
        lines = "\n  ".join(f"{key}: {reason}" for key, reason in error.problems)
        raise Problem(f"configuration is refused\n  {lines}", exit_code=2) from None


@contextmanager
def refusals() -> Iterator[None]:
    """Turns what files are refused for, and an extra that is not installed, into a Problem."""
    from tidegate.domain.errors import Refusal

    try:
        yield
    except Refusal as refusal:
        raise Problem(refusal.message, exit_code=2) from None
    except OSError as error:
        raise Problem(f"{error.filename}: {error.strerror}", exit_code=2) from None
    except ModuleNotFoundError as error:
        raise Problem(f"this needs the 'advisor' extra ({error.name} is not installed)", exit_code=2) from None
