"""What tests of the wire share."""

from support.commands import runner

__all__ = ["runner"]
