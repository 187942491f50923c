"""The life of a replica: every (state, event) pair is either in the table or refused."""

import pytest

from tidegate.domain.replica import TRANSITIONS, IllegalTransition, step
from tidegate.domain.replica import ReplicaEvent as E
from tidegate.domain.replica import ReplicaState as S


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("event", E)
def test_every_pair_is_in_the_table_or_refused(state: S, event: E) -> None:
    if (state, event) in TRANSITIONS:
        assert step(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition):
            step(state, event)


@pytest.mark.parametrize("start", S)
def test_every_state_can_come_back_to_ready(start: S) -> None:
    seen, todo = {start}, [start]
    while todo:
        here = todo.pop()
        for (state, _), after in TRANSITIONS.items():
            if state is here and after not in seen:
                seen.add(after)
                todo.append(after)
    assert S.READY in seen
    assert S.STOPPED in seen


def test_ready_is_only_reached_through_a_canary_or_an_unfinished_drain() -> None:
    ways = {state for (state, _), after in TRANSITIONS.items() if after is S.READY}
    assert ways == {S.STARTING, S.WAKING, S.DRAINING}


def test_a_sleeping_replica_was_drained_first() -> None:
    assert {state for (state, _), after in TRANSITIONS.items() if after is S.SLEEPING} == {S.DRAINING}
