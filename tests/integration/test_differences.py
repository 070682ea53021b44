"""The table of differences in the documentation is the one that the cases declare."""

from __future__ import annotations

import pytest
from integration import differences
from integration.case import MTAS, Case, Differs, Outcome, problems
from integration.cases import CASES

ADVICE = "run: python tests/integration/differences.py"


def test_the_page_is_up_to_date() -> None:
    assert differences.PAGE.read_text(encoding="utf-8") == differences.page(), ADVICE


def test_every_difference_is_of_a_known_mta_and_says_why() -> None:
    for case in CASES:
        assert case.topic, case.name
        for one in case.differs:
            assert set(one.mta.split()) <= set(MTAS), case.name
            assert one.why.endswith("."), case.name


def test_there_are_as_many_cases_as_promised() -> None:
    assert len(CASES) >= 80


def test_a_difference_in_a_step_that_there_is_not_is_an_error() -> None:
    case = Case("x", differs=(Differs("mock", "Why.", replies={"nonsense": "250"}),))
    with pytest.raises(ValueError, match="nonsense"):
        case.on("mock")


def events(*names: str) -> list[list[object]]:
    return [[1, name.endswith("!"), name.rstrip("!")] for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ("connect", "envfrom", "abort", "abort", "close"),
        ("connect", "envfrom", "envfrom", "abort", "close"),
        ("connect", "abort", "close"),
        ("connect", "envfrom", "envrcpt", "data", "eom", "abort", "close"),
        ("connect", "envfrom!", "abort", "close"),
        ("connect", "envfrom", "data", "envrcpt", "abort", "close"),
        ("connect", "envfrom", "eom", "header", "close"),
        ("connect", "close", "close"),
        ("connect", "envfrom", "abort"),
    ],
)
def test_what_no_application_may_see_is_found(names: tuple[str, ...]) -> None:
    """Two aborts, a message within a message, and the like fail every case."""
    found = problems(
        Case("x", dialogue=(), delivered=()), Outcome(seen=[list(e) for e in events(*names)])
    )
    assert found


def test_what_an_application_may_see_is_not_found() -> None:
    seen = events(
        *("connect", "hello", "envfrom", "abort", "envfrom", "envrcpt!", "envfrom", "envrcpt"),
        *("data", "header", "eoh", "body", "eom", "envfrom", "abort", "close"),
    )
    case = Case("x", dialogue=(), delivered=())
    assert problems(case, Outcome(seen=[list(event) for event in seen])) == []
