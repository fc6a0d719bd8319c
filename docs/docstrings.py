"""An extension of griffe that prepares docstrings for the reference pages.

The site reads the source without running it. This extension gives a class the docstring that it
shares with another by `__doc__ = _Translution.__doc__`, and turns the options of a configuration
into a list, with their types and defaults below.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ATTRIBUTES = re.compile(r"^Attributes:\n(?: .*\n|\n)*", re.MULTILINE)
NAMES = re.compile(r"^    \w+(?:, \w+)+(?=:)", re.MULTILINE)
OPTION = re.compile(r"^(?=[a-z_]+(?:, [a-z_]+)*: )", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Prepare the docstring of a class.

        A shared docstring is copied, attributes that are documented together ("heads, head_dim")
        become one entry, and the options of a configuration become a list.
        """
        given = cls.members.get("__doc__")
        if isinstance(given, griffe.Attribute):
            other = cls.module[str(given.value).removesuffix(".__doc__")].docstring
            if other is not None:
                cls.docstring = griffe.Docstring(other.value, lineno=other.lineno, parent=cls)
        if cls.docstring:  # griffe ends the name of an attribute at the first space
            text = cls.docstring.value + "\n"
            text = ATTRIBUTES.sub(lambda section: NAMES.sub(_joined, section[0]), text)
            cls.docstring.value = text.rstrip()
        if cls.docstring and [str(base) for base in cls.bases] == ["Options"]:
            first, *rest = OPTION.split(cls.docstring.value)
            items = (f"- {' '.join(item.split())}" for item in rest)
            cls.docstring.value = "\n".join([first.rstrip(), "", *items, "", *_fields(cls)])


def _joined(names: re.Match[str]) -> str:
    return names[0].replace(", ", ",\u00a0")


def _fields(cls: griffe.Class) -> list[str]:
    """The options of a configuration with their types and defaults, as a block of code."""
    lines = []
    for field in cls.members.values():
        typed = isinstance(field, griffe.Attribute) and field.annotation
        if typed and field.name[0] != "_" and "property" not in field.labels:
            default = "" if field.value is None else f" = {field.value}"
            lines.append(f"{field.name}: {field.annotation}{default}")
    return ["```python", *lines, "```"]
