"""The price book on SQLite and PostgreSQL."""

import pytest
from sqlalchemy import Engine

from tests.money import price
from tidegate.domain.errors import Refusal
from tidegate.stores.prices import SqlPriceBook


def test_versions_are_added_and_read_back_in_order(sql_engine: Engine) -> None:
    book = SqlPriceBook(sql_engine)
    assert book.versions() == []
    later = book.add(price(effective_ms=200, input_nano_usd=2**60))
    first = book.add(price(effective_ms=100))
    gold = book.add(price(plan="gold", effective_ms=100))
    assert len({later.id, first.id, gold.id}) == 3
    assert book.versions() == [first, later, gold]
    assert book.versions("gold") == [gold]
    assert book.versions("none") == []


def test_two_versions_of_a_plan_cannot_begin_at_the_same_instant(sql_engine: Engine) -> None:
    book = SqlPriceBook(sql_engine)
    kept = book.add(price(effective_ms=100))
    with pytest.raises(Refusal) as refused:
        book.add(price(effective_ms=100, input_nano_usd=1))
    assert (refused.value.code, refused.value.param) == ("conflict", "effective")
    assert book.versions() == [kept]
