"""The capacity core: which replica is where, and when that changes. Composes the policies; see `core.FleetCore`."""

from tidegate.policy.reconcile.core import FleetCore
from tidegate.policy.reconcile.settings import CoreSettings
from tidegate.policy.view import FleetView

__all__ = ["CoreSettings", "FleetCore", "FleetView"]
