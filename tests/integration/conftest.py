"""The MTAs: started once for each worker, when the first case needs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration import laboratory


@pytest.fixture(scope="session")
def lab() -> Iterator[laboratory.Laboratory]:
    """The place where cases are run."""
    made = laboratory.Laboratory()
    yield made
    made.close()
