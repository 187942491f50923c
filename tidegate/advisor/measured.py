"""A curve that `tidegate tune --save` measured, as the advisor reckons with it."""

from pathlib import Path

from tidegate.advisor.columns import refuse
from tidegate.advisor.hardware import Measured, known
from tidegate.wire import profiles


def read(path: Path) -> Measured:
    """Raises Refusal naming the file and what is missing in it."""
    try:
        profile = profiles.parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"--profile: {path} cannot be read ({type(error).__name__})") from error
    except ValueError as error:
        raise refuse(f"--profile: {path}: {error}") from error
    if profile.accelerator not in known()[0]:
        names = ", ".join(known()[0])
        raise refuse(f"--profile: {path}: accelerator {profile.accelerator!r} is not known; accepted: {names}")
    if not (profile.curve and profile.prompt_tokens and profile.output_tokens):
        raise refuse(f"--profile: {path} has no curve with prompt_tokens and output_tokens: `tidegate tune` makes one")
    points = sorted(profile.curve, key=lambda point: point.slots)
    return Measured(
        profile.accelerator,
        profile.accelerators_per_replica,
        profile.prompt_tokens,
        profile.output_tokens,
        tuple(point.slots for point in points),
        tuple(point.tokens_per_s for point in points),
        tuple(point.ttft_ms for point in points),
        tuple(point.tpot_ms for point in points),
    )
