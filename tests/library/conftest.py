"""Fixtures for the tests of the context's stand-in."""

from __future__ import annotations

import pytest
from milter import CONTINUE

import Milter
from Milter import testctx


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Make the class of filter from callbacks and play a session; returns the context."""
    monkeypatch.chdir(tmp_path)

    def play(bases=(Milter.Base,), opts=None, session=True, **callbacks):
        klass = type("Played", bases, callbacks)
        monkeypatch.setattr(Milter, "factory", klass)
        ctx = testctx.TestCtx()
        if opts is not None:
            ctx._opts = list(opts)
        if session:
            assert ctx._connect() == CONTINUE
        return ctx

    return play
