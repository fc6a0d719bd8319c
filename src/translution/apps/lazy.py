"""Commands that are imported when they are called, and options that take either form."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "lazy_group"]

EITHER = "Options take --key=value and --key value alike; a value that begins with -- needs the =."


class Command(TyperCommand):
    """Of an option that it does not know, it makes one word: --key value becomes --key=value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if self.context_settings.get("ignore_unknown_options"):
            known = {name for param in self.params for name in param.opts + param.secondary_opts}
            args = _joined(args, known | {"--help"})
        return super().parse_args(ctx, args)


def _joined(args: list[str], known: set[str]) -> list[str]:
    done: list[str] = []
    changes: list[str] = []  # behind the arguments, in whose place they would be taken
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
    """Without the line breaks of the source, but for those between paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


class _Commands(dict[str, Any]):
    """Commands by name, made when they are asked for."""

    def __init__(self, table: Mapping[str, tuple[str, str, str]]):
        super().__init__(table)
        self.table = table

    def __getitem__(self, name: str) -> Any:
        module, function, _ = self.table[name]
        run = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        settings: dict[str, Any] = {}
        text = inspect.cleandoc(run.__doc__ or "")
        if "context" in inspect.signature(run).parameters:
            # what a command does not know itself is a change of the configuration
            settings = {"allow_extra_args": True, "ignore_unknown_options": True}
            text += f"\n\n{EITHER}"
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name, cls=Command, context_settings=settings, help=_paragraphs(text))(run)
        return typer.main.get_command(app)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.table else default

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)


def lazy_group(table: Mapping[str, tuple[str, str, str]]) -> type[TyperGroup]:
    """The group of the commands in a table: name -> (module, function, one line of help)."""

    class Group(TyperGroup):
        def __init__(self, **settings: Any):
            super().__init__(**settings)
            self.commands = _Commands(table)

        def list_commands(self, ctx: Any) -> list[str]:
            return list(table)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            """For lists and completion: the name and its line of help alone."""
            if cmd_name not in table:
                return None
            return TyperCommand(cmd_name, help=table[cmd_name][2])

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, command, rest = super().resolve_command(ctx, args)
            return name, command and self.commands[str(name)], rest

    return Group
