"""The figures that the paper prints, from paper_tables.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jlml_jax.result_rows import TITLES

_PAPER = json.loads((Path(__file__).parents[1] / "paper_tables.json").read_text())

# The paper's mAP is set beside the AP of Market-1501's own code; the mean precision at hits is in the CSV as mean_ap.
OUR_SCORE = {"mean_ap": "mean_ap_trapezoid"}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a published table."""

    score: str
    unit: str
    dataset: str = ""
    protocol: str = ""
    group: str = ""  # the heading over several columns: Labelled, Multi-Query

    @property
    def heading(self) -> str:
        return f"{self.group} {TITLES[self.score]}".lstrip()


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """A table of the paper; a figure is None where it prints a dash."""

    title: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float | None, ...]]


def load(name: str) -> PublishedTable:
    """The table of that number, 5 to 13."""
    table: dict[str, Any] = _PAPER["tables"][name]
    return PublishedTable(table["title"], tuple(Column(**column) for column in table["columns"]),
                          {line: tuple(values) for line, values in table["rows"].items()})


def source() -> str:
    """The paper, cited."""
    return _PAPER["source"]


def citation(line: str) -> str:
    """Whose method or network a line is, such as `Liao et al., 2015`; the paper's own if it is not another's."""
    return _PAPER["methods"].get(line, _PAPER["methods"]["JLML"])["citation"]
