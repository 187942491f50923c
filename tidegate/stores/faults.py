"""How a failure of the database leaves an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from tidegate.domain.errors import StoreFault


@contextmanager
def sql_faults(what: str) -> Iterator[None]:
    """Turns every SQL error into a StoreFault that says `what` could not be done, without values or paths."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreFault(what) from error
