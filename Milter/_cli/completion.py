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

#: The same for zsh, whose own completion of Python's options stays for all else.  The length of the
#: line is one in bytes.
_ZSH = """\
_pymilter() {
    if [[ "${words[2]-}" != -m || "${words[3]-}" != Milter || CURRENT -lt 4 ]]; then
        if (( $+functions[_python] )); then _python "$@"; else _default "$@"; fi
        return
    fi
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a found more
    found=(${(f)"$(COMP_LINE="$line" COMP_POINT="$(print -rn -- "$line" | wc -c)" \\
        _ARGCOMPLETE=3 _ARGCOMPLETE_SHELL=zsh _ARGCOMPLETE_SUPPRESS_SPACE=1 \\
        _ARGCOMPLETE_IFS=$'\\n' \\
        ${~${(Q)words[1]}} -m Milter 8>&1 9>/dev/null >/dev/null 2>&1 </dev/null)"})
    found=("${(@)found%:}")
    if [[ "${found[1]-}" == *[/=] ]]; then more=(-S ''); fi
    _describe Milter found "${more[@]}"
}
compdef _pymilter python python3"""

#: And for fish, which adds it to what it knows of Python.
_FISH = """\
function __pymilter_is_asked
    set -l words (commandline -opc)
    test (count $words) -ge 3; and test "$words[2] $words[3]" = "-m Milter"
end
function __pymilter_complete
    set -l words (commandline -opc)
    set -lx COMP_LINE (commandline -cp | string collect)
    set -lx COMP_POINT (printf %s "$COMP_LINE" | wc -c)
    set -lx _ARGCOMPLETE 3
    set -lx _ARGCOMPLETE_SHELL fish
    set -lx _ARGCOMPLETE_SUPPRESS_SPACE 1
    set -lx _ARGCOMPLETE_IFS \\n
    set -lx _ARGCOMPLETE_DFS \\t
    set -l python (string replace -r '^~/' "$HOME/" -- $words[1])
    $python -m Milter 8>&1 9>/dev/null >/dev/null 2>/dev/null </dev/null
end
complete -c python -n __pymilter_is_asked -f -a '(__pymilter_complete)'
complete -c python3 -n __pymilter_is_asked -f -a '(__pymilter_complete)'"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


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
        print(SCRIPTS[str(values)])
        parser.exit()
