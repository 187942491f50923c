"""The data plane: auth → admission → route → hold → relay → usage record."""

from tidegate.gateway.app import Gateway
from tidegate.gateway.limits import GatewayLimits

__all__ = ["Gateway", "GatewayLimits"]
