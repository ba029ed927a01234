"""Values that do not fit a type are named by path, with the allowed and the given, for all of msgspec's messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from tokenmill.misfit import misfit

Size = Annotated[int, msgspec.Meta(ge=1, le=8)]


class Inner(msgspec.Struct, rename={"kind": "type"}):
    kind: Literal["a", "b"]
    size: Annotated[Size | None, msgspec.Meta(description="How large.")] = None
    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5


class Even(msgspec.Struct):
    sides: int

    def __post_init__(self) -> None:
        if self.sides % 2:
            raise ValueError(f"{self.sides} sides are not even")


class Outer(msgspec.Struct):
    name: str
    inner: Annotated[Inner | None, msgspec.Meta(description="More.")] = None
    stop: Annotated[str | list[str] | None, msgspec.Meta(description="Where to end.")] = None
    rows: list[list[int]] = []
    named: dict[str, Inner] = {}
    pair: tuple[int, str] = (0, "")
    many: tuple[float, ...] = ()
    flag: bool | None = None
    anything: Any = None
    even: Even | None = None


CASES: list[tuple[str, str, str | None]] = [
    ("3", "the body must be an object. Given: 3", None),
    ("[]", "the body must be an object", None),
    ("{}", "`name` is missing; it must be a string", "name"),
    ('{"name": null}', "`name` must be a string. Given: null", "name"),
    ('{"name": "x", "inner": {}}', "`inner.type` is missing; it must be one of a, b", "inner.type"),
    ('{"name": "x", "inner": {"type": "c"}}', "`inner.type` must be one of a, b. Given: c", "inner.type"),
    ('{"name": "x", "inner": [1]}', "`inner` must be an object, or null", "inner"),
    ('{"name": "x", "inner": {"type": "a", "size": 9}}',
     "`inner.size` must be an integer, at least 1 and at most 8, or null. Given: 9", "inner.size"),
    ('{"name": "x", "inner": {"type": "a", "share": 1}}',
     "`inner.share` must be a number, more than 0 and less than 1. Given: 1", "inner.share"),
    ('{"name": "x", "inner": {"type": "a", "size": 1.5}}',
     "`inner.size` must be an integer, at least 1 and at most 8, or null. Given: 1.5", "inner.size"),
    ('{"name": "x", "stop": ["a", 3]}', "`stop[1]` must be a string. Given: 3", "stop.1"),
    ('{"name": "x", "stop": true}', "`stop` must be a string, a list of strings, or null. Given: true", "stop"),
    ('{"name": "x", "rows": [[1], [2, "b"]]}', "`rows[1][1]` must be an integer. Given: b", "rows.1.1"),
    ('{"name": "x", "named": {"q": {"type": 1}}}', "`named.q.type` must be one of a, b. Given: 1", "named.q.type"),
    ('{"name": "x", "pair": [1, 2]}', "`pair[1]` must be a string. Given: 2", "pair.1"),
    ('{"name": "x", "pair": [1]}', "`pair` must be a list of 2 values", "pair"),
    ('{"name": "x", "many": [1, {}]}', "`many[1]` must be a number", "many.1"),
    ('{"name": "x", "even": {"sides": 3}}', "`even`: 3 sides are not even", "even"),
    ('{"name": "x", "flag": "yes"}', "`flag` must be true or false, or null. Given: yes", "flag"),
    ('{"name": "x", "anything": {"deep": [1e999]}}',
     "`anything` must be a value without numbers that 64 bits cannot hold", "anything"),
    ('{"name": "x", "many": [1e999]}', "`many[0]` must be a number that 64 bits can hold. Given: 1e999", "many.0"),
]  # fmt: skip


@pytest.mark.parametrize("body, told, param", CASES)
def test_the_part_at_fault_is_named_in_json(body: str, told: str, param: str | None) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=Outer)
    found = misfit(msgspec.Raw(body.encode()), Outer)
    assert (found.sentence("the body"), found.param) == (told, param)


@pytest.mark.parametrize("body, told, param", [case for case in CASES if "1e999" not in case[0]])
def test_the_part_at_fault_is_named_in_plain_data(body: str, told: str, param: str | None) -> None:
    found = misfit(msgspec.json.decode(body), Outer)
    assert (found.sentence("the body"), found.param) == (told, param)


def test_what_fits_where_types_are_not_strict_is_no_fault() -> None:
    value = {"name": "x", "inner": {"type": "a", "size": "3"}, "rows": [["1", "x"]]}
    assert misfit(value, Outer, strict=False).sentence() == "`rows[0][1]` must be an integer. Given: x"
    assert misfit(value, Outer).path == "inner.size"


def test_long_values_and_lists_are_not_repeated() -> None:
    assert len(misfit({"name": 10**5000}, Outer).sentence()) < 100
    assert len(misfit({"name": "x", "rows": "y" * 5000}, Outer).sentence()) < 150
    many = msgspec.Raw(msgspec.json.encode({"name": "x", "many": [0] * 20_000 + ["y"]}))
    assert misfit(many, Outer).sentence() == "`many` must be a list of numbers"
