"""Garbage collection in the `up` process, tuned to what it allocates."""

import gc

YOUNG_OBJECTS_MAX = 100_000


def tune() -> None:
    """What was made at start (modules, tables, routes) lives as long as the process and need not be looked at again.
    A page of the ledger makes some 25,000 objects that reference counting frees: looking for cycles among them every
    700 objects would be a quarter of what posting it costs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, 10, 10)
