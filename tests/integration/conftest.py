"""The MTAs: started once for each worker, when the first case needs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from integration import laboratory


@pytest.fixture(scope="session")
def lab() -> Iterator[laboratory.Laboratory]:
    """The place where cases are run."""
    made = laboratory.Laboratory()
    yield made
    made.close()
