"""The commands of ``python -m Milter``, a module for each, and what they share."""
