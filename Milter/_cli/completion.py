"""Completion of the commands' options by the shell, with the library argcomplete."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._extras import unusable

#: The shell asks this very command, as the library has it: with the line in the environment, and
#: how many words of it are the program's name; the answer comes from descriptor 8.
_BASH = """\
_pymilter() {
    [ "${COMP_WORDS[1]-}" = -m ] && [ "${COMP_WORDS[2]-}" = Milter ] || return
    local IFS=$'\\013'
    COMPREPLY=($(IFS="$IFS" COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" \\
        COMP_TYPE="$COMP_TYPE" _ARGCOMPLETE_SUPPRESS_SPACE=1 \\
        _ARGCOMPLETE_COMP_WORDBREAKS="$COMP_WORDBREAKS" _ARGCOMPLETE=3 _ARGCOMPLETE_SHELL=bash \\
        "$1" -m Milter 8>&1 9>/dev/null >/dev/null 2>&1))
    [ "$?" -eq 0 ] || COMPREPLY=()
}
complete -o default -o bashdefault -F _pymilter python python3"""


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Answer and exit where it is the shell that asks; without the library there is no answer."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    argcomplete.autocomplete(parser)


class PrintCompletion(argparse.Action):
    """The option that prints what a shell evaluates, and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            import argcomplete  # noqa: F401 - it is needed when the shell asks
        except ImportError as exc:
            parser.error(str(unusable(str(option_string), "argcomplete", "argcomplete", exc)))
        print(_BASH)
        parser.exit()
