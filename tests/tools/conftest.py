"""What tests of commands share."""

from support.commands import runner

__all__ = ["runner"]
