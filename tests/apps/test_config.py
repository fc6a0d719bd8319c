"""Configurations: typed, and every error names the key, the file and what is allowed."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest

pytest.importorskip("pydantic")
from pydantic import Field

from translution.apps.config import Options, as_yaml, load, parse


class Apples(Options):
    kind: Literal["apples"] = "apples"
    number: int = 1


class Pears(Options):
    kind: Literal["pears"] = "pears"
    sort: Literal["green", "red"] = "green"
    inner: Apples = Apples()


class Basket(Options):
    fruit: Annotated[Apples | Pears, Field(discriminator="kind")]
    weights: tuple[float, ...] = ()
    rate: float = 1.0


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "basket.yaml"
        path.write_text(text)
        return path

    return write


def test_loads_changes_and_prints(file):
    path = file("fruit: {kind: pears, sort: red}\nrate: 3e-4\n")
    assert load(Basket, path).rate == 3e-4
    changed = load(Basket, path, ["--fruit.inner.number=5", "weights=[1, 2.5]"])
    assert changed.fruit.inner.number == 5
    assert changed.weights == (1, 2.5)
    assert load(Basket, file(as_yaml(changed))) == changed


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        ("fruit: {kind: pears, sort: blue}", [], r"basket.yaml: fruit.sort: got 'blue', .*'green'"),
        ("fruit: {kind: pears, inner: {numbr: 2}}", [],
         r"basket.yaml: fruit.inner.numbr: there is no such key \(did you mean number\?\); "
         r"allowed are kind, number"),
        ("fruit: {kind: apples, number: many}", [], r"fruit.number: got 'many', .*integer"),
        ("fruit: {kind: plums}", [], r"fruit: .*'plums'.*'apples', 'pears'"),
        ("{}", [], r"basket.yaml: fruit: is missing"),
        ("fruit: {kind: apples}\nrate: 1\nrate: 2", [], r"'rate' is there twice"),
        ("fruit: [", [], r"basket.yaml: not YAML"),
        ("- 1", [], r"got list, want keys and values"),
        ("fruit: {kind: apples}", ["--fruit.number=x"], r"command line: fruit.number: got 'x'"),
        ("fruit: {kind: apples}", ["--colour=x"], r"command line: colour: there is no such key"),
        ("fruit: {kind: apples}", ["--rate"], r"want --key=value"),
        ("fruit: {kind: apples}\nrate: 1", ["--rate.x=1"], r"'rate', which is a value"),
        ("fruit: {kind: apples}", ["--rate=[1"], r"command line: .*not YAML"),
    ],
)  # fmt: skip
def test_errors_name_the_key_and_the_file(file, text, changes, told):
    with pytest.raises(ValueError, match=told):
        load(Basket, file(text), changes)


def test_of_many_errors_five_are_told(file):
    wrong = "".join(f"k{number}: 1\n" for number in range(7))
    with pytest.raises(ValueError, match="there is no such key") as error:
        load(Basket, file("fruit: {kind: apples}\n" + wrong))
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert all("basket.yaml: k" in line for line in lines[:5])
    assert lines[5] == "and 2 more"
    with pytest.raises(ValueError, match="there is no such key") as error:
        load(Basket, file("fruit: {kind: apples}\nk0: 1\nk1: 1"))
    assert len(str(error.value).splitlines()) == 2


def test_a_dict_is_left_alone():
    content = {"fruit": {"kind": "apples"}}
    assert parse(Basket, content, "here", ["--fruit.number=3"]).fruit.number == 3
    assert content == {"fruit": {"kind": "apples"}}
