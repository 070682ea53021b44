"""The MTAs: started once for each worker, when the first case needs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from integration import differences, laboratory


@pytest.fixture(scope="session")
def lab() -> Iterator[laboratory.Laboratory]:
    """The place where cases are run."""
    made = laboratory.Laboratory()
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much is compared, at the end of the run."""
    terminalreporter.write_line(differences.summary())
