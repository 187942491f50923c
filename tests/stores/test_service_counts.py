"""Counts of service levels on SQLite and PostgreSQL: a place of a ring is replaced, a removed endpoint is gone."""

import pytest
from sqlalchemy import Engine, text

from tidegate.domain.errors import StoreFault
from tidegate.stores.service_counts import Row, SqlServiceCounts

OLD: list[Row] = [("acme/a", "5m", 1, 101, 4, 3, 1), ("acme/a", "1h", 7, 7, 4, 3, 1), ("acme/b", "5m", 1, 101, 2, 2, 0)]


def test_a_place_is_replaced_and_the_rest_stays(sql_engine: Engine) -> None:
    counts = SqlServiceCounts(sql_engine)
    assert list(counts.load()) == []
    counts.save(OLD, ())
    assert sorted(counts.load()) == sorted(OLD)
    again: Row = ("acme/a", "5m", 1, 131, 1, 1, 0)
    counts.save([again], ())
    assert sorted(SqlServiceCounts(sql_engine).load()) == sorted([again, *OLD[1:]])


def test_a_removed_endpoint_may_come_back_in_the_same_save(sql_engine: Engine) -> None:
    counts = SqlServiceCounts(sql_engine)
    counts.save(OLD, ())
    counts.save([OLD[0]], {"acme/a", "acme/never"})
    assert sorted(counts.load()) == sorted([OLD[0], OLD[2]])


def test_a_broken_database_is_a_fault(sql_engine: Engine) -> None:
    with sql_engine.begin() as connection:
        connection.execute(text("DROP TABLE service_counts"))
    with pytest.raises(StoreFault, match="read"):
        SqlServiceCounts(sql_engine).load()
    with pytest.raises(StoreFault, match="written"):
        SqlServiceCounts(sql_engine).save(OLD, ())
