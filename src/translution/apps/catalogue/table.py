"""The stored table of what models cost: `python -m translution.apps.catalogue.table --write`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

__all__ = ["FILE", "read_table", "row"]

FILE = Path(__file__).with_name("models.json")


def read_table() -> dict[str, dict[str, Any]]:
    """What each model costs by its name, as in `row`; imports no torch."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text("utf-8"))
    return found


def row(name: str) -> dict[str, Any]:
    """The fields of `counts.Entry` and `counts.Costs`, counted now."""
    from .counts import costs, entry

    found = {**dataclasses.asdict(entry(name)), **dataclasses.asdict(costs(name))}
    del found["name"]
    return found | {"input": list(found["input"])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count all models, about a minute.")
    parser.add_argument("--write", action="store_true", help=f"Write {FILE.name}.")
    write = parser.parse_args().write
    from ...models import list_models
    from ...utils.files import write_whole

    found = {name: row(name) for name in list_models()}
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if write:
        write_whole(FILE, lambda to: to.write_text(text, "utf-8"))
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
