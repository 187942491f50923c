"""The part of the admin API that publishes what activations take on this fleet, by the size of the model."""

from msgspec import Struct

from tidegate.wire.admin import BoundView


class SizeBounds(Struct, frozen=True):
    """Models of at most `weight_bytes_max` bytes and above the size before it; null: larger than all others. `tiers` is
    by the tier their weights came from.
    """

    size: str
    weight_bytes_max: int | None
    tiers: dict[str, BoundView]
