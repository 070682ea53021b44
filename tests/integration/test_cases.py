"""Every case on every MTA."""

from __future__ import annotations

import pytest
from integration import laboratory
from integration.case import MTAS, Case, problems
from integration.cases import CASES


@pytest.mark.parametrize("mta", MTAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, mta: str, lab: laboratory.Laboratory) -> None:
    """What the client, the filter and the next hop see is what the case says."""
    laboratory.require(mta, case)
    bench = lab.bench(mta)
    found = problems(case.on(mta), bench.run(case))
    assert not found, "\n".join(
        found + bench.filter(case.port).log[-30:] + [bench.server.log[-3000:]]
    )
