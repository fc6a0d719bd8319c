"""The stored table of what each model costs.

`python -m translution.apps.catalogue.table --write` counts all models again and writes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

__all__ = ["FILE", "counted", "read_table"]

FILE = Path(__file__).with_name("models.json")


def read_table() -> dict[str, dict[str, Any]]:
    """Read the stored fields of each model by its name, without importing torch."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text("utf-8"))
    return found


def counted(name: str) -> dict[str, Any]:
    """Count a model and return its fields, as the table stores them.

    Args:
        name: the name of the model.

    Returns:
        The fields of `counts.Entry`, without the name, and of `counts.Costs`.
    """
    from .counts import costs, entry

    found = {**dataclasses.asdict(entry(name)), **dataclasses.asdict(costs(name))}
    del found["name"]
    return found | {"input": list(found["input"])}


def main() -> None:
    """Count all models, and print or write the table."""
    parser = argparse.ArgumentParser(description="Count all models, which takes about a minute.")
    parser.add_argument(
        "--write", action="store_true", help=f"Write {FILE.name} instead of printing the table."
    )
    write = parser.parse_args().write
    from ...models import list_models
    from ...utils.files import write_whole

    found = {name: counted(name) for name in list_models()}
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if write:
        write_whole(FILE, lambda to: to.write_text(text, "utf-8"))
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
