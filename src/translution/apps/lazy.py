"""Commands that are imported when they are called, both forms of options, and usage errors.

This module needs typer. The command line (`cli`) imports it only when a command runs.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .._version import __version__

__all__ = ["USAGE_ERRORS", "Command", "application", "usage_error"]

EITHER = "Options accept --key=value and --key value; a value that begins with -- needs the =."

# the base class of the errors that typer prints (in its newer versions not click's own class)
USAGE_ERRORS: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)
WANTED = {  # by the types of pydantic's errors, which typer converts options with
    "int_parsing": "an integer",
    "int_type": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}

OPTION_ERRORS = {  # by a part of typer's message
    "No such option": "no such option",
    "does not take a value": "takes no value",
    "requires an argument": "got nothing, want a value",
}


def usage_error(error: Any) -> str:
    """Describe an error of `USAGE_ERRORS` in one line: what was given and what is wanted."""
    context, param = getattr(error, "ctx", None), getattr(error, "param", None)
    see = f"; see {context.command_path} --help" if context else ""
    if param is None:
        said = " ".join(error.format_message().split()).rstrip(".")
        name = getattr(error, "option_name", None)
        if close := getattr(error, "possibilities", None):
            return f"{name}: no such option; did you mean {' or '.join(sorted(close))}?"
        for typers, ours in OPTION_ERRORS.items():
            if name and typers in said:
                return f"{name}: {ours}{see}"
        return f"{said[:1].lower()}{said[1:]}{see}"
    name = _name(param)
    if type(error).__name__ == "MissingParameter":
        return f"{name}: got nothing, want a value{see}"
    if not (found := getattr(error.__cause__, "errors", None)):
        return f"{name}: {' '.join(error.message.split())}"
    first = found()[0]  # of pydantic
    given = first["input"] if first["input"] != "" else "''"
    if want := WANTED.get(first["type"]):
        return f"{name}: got {given}, want {want.format(**first.get('ctx', {}))}"
    return f"{name}: got {given}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _name(param: Any) -> str:
    """An option or argument as messages name it: --out, CONFIG."""
    name = max(param.opts, key=len)
    if param.param_type_name == "argument":
        name = (param.metavar or name).strip("[].").upper()
    return str(name)


class Command(TyperCommand):
    """A command that joins unknown options with their values: --key value becomes --key=value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if self.context_settings.get("ignore_unknown_options"):
            known = {name for param in self.params for name in param.opts + param.secondary_opts}
            args = _joined(args, known | {"--help"})
        return super().parse_args(ctx, args)


def _joined(args: list[str], known: set[str]) -> list[str]:
    done: list[str] = []
    changes: list[str] = []  # moved behind the arguments, or typer would take them as arguments
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*done, word, *rest, *changes]
        new = word.startswith("--") and "=" not in word and word not in known
        if new and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        is_change = new or (word.startswith("--") and word.partition("=")[0] not in known)
        (changes if is_change else done).append(word)
    return done + changes


def _paragraphs(text: str) -> str:
    """Remove the line breaks of the source, except those between paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


class _Commands(dict[str, Any]):
    """Commands by name. A command is imported and built when it is looked up."""

    def __init__(self, table: Mapping[str, tuple[str, str, str]]):
        super().__init__(table)
        self.table = table

    def __getitem__(self, name: str) -> Any:
        module, function, _ = self.table[name]
        run = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        settings: dict[str, Any] = {}
        text = inspect.cleandoc(run.__doc__ or "")
        if "context" in inspect.signature(run).parameters:
            # options that the command does not define are changes of the configuration
            settings = {"allow_extra_args": True, "ignore_unknown_options": True}
            text += f"\n\n{EITHER}"
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name, cls=Command, context_settings=settings, help=_paragraphs(text))(run)
        command: Any = typer.main.get_command(app)
        hints = typing.get_type_hints(run)
        for param in command.params:
            if _has_path(hints.get(param.name)):
                _refuse_empty(param)
        return command

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.table else default

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)


def _has_path(hint: Any) -> bool:
    return hint is Path or any(map(_has_path, typing.get_args(hint)))


def _refuse_empty(param: Any) -> None:
    """Let a file or folder not be "", which would stand for the working directory."""
    process = param.process_value

    def checked(context: Any, value: Any) -> Any:
        if value == "" or (isinstance(value, list | tuple) and "" in value):
            raise ValueError(f"{_name(param)}: got '', want the name of a file or folder")
        return process(context, value)

    param.process_value = checked


def application(table: Mapping[str, tuple[str, str, str]]) -> typer.Typer:
    """Make the application of the commands in a table: name -> (module, function, line of help)."""
    app = typer.Typer(
        cls=_lazy_group(table),
        pretty_exceptions_enable=False,
        help="Attention with a sense of where: train, use and compare models, measure operators.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"translution {__version__}")
            raise typer.Exit

    @app.callback(invoke_without_command=True)
    def _(
        context: typer.Context,
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=show_version, help="Print the version."
        ),
    ) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help(), end="")
            raise typer.Exit(2)

    return app


def _lazy_group(table: Mapping[str, tuple[str, str, str]]) -> type[TyperGroup]:
    class Group(TyperGroup):
        def __init__(self, **settings: Any):
            super().__init__(**settings)
            self.commands = _Commands(table)

        def list_commands(self, ctx: Any) -> list[str]:
            return list(table)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            """The command for lists and completion: only its name and line of help."""
            if cmd_name not in table:
                return None
            return TyperCommand(cmd_name, help=table[cmd_name][2])

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args and args[0] not in table and not args[0].startswith("-"):
                close = difflib.get_close_matches(args[0], table, 1)
                want = f"did you mean {close[0]}?" if close else f"want one of {', '.join(table)}"
                raise ValueError(f"COMMAND: got {args[0]}; {want}")
            name, command, rest = super().resolve_command(ctx, args)
            return name, command and self.commands[str(name)], rest

    return Group
