"""The command line: ``python -m Milter``.

``run`` serves with a filter class, ``config`` has an MTA ask it,
``check`` says whether a filter answers, ``send`` brings a message before it as an MTA would and
shows what came out; ``record`` stands between an MTA and a filter and writes down what they say.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ._cli import check, common, completion, config, record, run, send, streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name, ``sys.argv[1:]`` by default.
    """
    streams.prepare()
    try:
        args = _parse(argv)
        run_command: Callable[[argparse.Namespace], int] = args.run
        return run_command(args)
    finally:
        streams.settle()


class _Parser(argparse.ArgumentParser):
    #: Whether the user asked for JSON, so that a program reads what is wrong, too.
    wants_json = False

    def _print_message(self, message: str, file: Any = None) -> None:
        # As Python 3.11 and later do: help that nobody takes is no failure.
        with contextlib.suppress(OSError):
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        # argparse's words for an option that is given a value though it takes none.
        message = message.replace("ignored explicit argument", "it takes no value such as")
        if _Parser.wants_json:
            common.show_report(self.prog, common.error_as_json(message, "arguments", 2))
        super().error(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        # Found out only when it is asked for: that reads files.
        from importlib import metadata

        package = os.path.dirname(os.path.abspath(__file__))
        print(f"pymilter {metadata.version('pymilter')} ({package}, Python {_python_version()})")
        parser.exit()


def _python_version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m Milter", description="Tools for mail filters (milters).")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        action=completion.PrintCompletion,
        choices=tuple(completion.SCRIPTS),
        help="print what the shell evaluates to complete commands and options, and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (run, config, check, send, record):
        command.add_parser(commands)
    completion.answer_shell(parser)
    _Parser.wants_json = "--json" in (sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(argv)
    if rest and not (args.command == "config" and config.take_class(args, rest)):
        command_parser = commands.choices[args.command]
        command_parser.error(f"unrecognized arguments: {_with_near_ones(rest, command_parser)}")
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def _with_near_ones(words: list[str], parser: argparse.ArgumentParser) -> str:
    """The words, and what options that nobody knows may have been meant to be."""
    known = [each for each in parser._option_string_actions if each[:2] == "--"]
    hints = []
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], known, 1, 0.75)
        hints += [f"did you mean {near[0]}?" for _ in near if word[:2] == "--"]
    return " ".join([*words, *(f"({hint})" for hint in hints)])


if __name__ == "__main__":
    sys.exit(main())
