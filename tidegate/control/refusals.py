"""Refusals of an endpoint's configuration, all in one form: the field, its value, what would be accepted."""

from tidegate.domain.errors import Refusal


def refused(param: str, value: object, accepted: str) -> Refusal:
    """Refusal invalid_configuration; `accepted` says what may stand there instead."""
    shown = "null" if value is None else repr(str(value)) if isinstance(value, str) else str(value)
    return Refusal("invalid_configuration", f"`{param}`: {shown} is not accepted; accepted: {accepted}", param=param)
