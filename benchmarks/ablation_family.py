"""A family of an ablation: a folder with a YAML a row, and what the paper found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mask_rcnn_plus.errors import UserError, did_you_mean

_CONFIGS = Path("configs", "ablations")
DESCRIPTION = "family.json"
_KEYS = {"title", "baseline", "order", "paper", "rows", "alone", "classes"}


@dataclass(frozen=True)
class Family:
    """Rows that differ in one choice.

    Attributes:
        name: the folder's name.
        folder: where the configs lie.
        rows: names of the config files without their ending, in the table's order.
        baseline: the row that the others are compared with.
        title: of the table.
        paper: where the paper's figures come from; "" where there are none.
        paper_rows: row -> metric, e.g. "mask AP" -> the paper's figure in percent.
        alone: "all" leaves it out, as it is no table of the paper or needs data not generated.
        classes: names of those whose own AP is to be shown, too.
    """

    name: str
    folder: Path
    rows: tuple[str, ...]
    baseline: str
    title: str
    paper: str
    paper_rows: dict[str, dict[str, float]]
    alone: bool = False
    classes: tuple[str, ...] = ()

    def config_file(self, row: str) -> Path:
        return self.folder / f"{row}.yaml"

    def paper_difference(self, row: str, metric: str) -> float | None:
        """How much more the row has than the baseline in the paper; None where it does not say."""
        figures = [self.paper_rows.get(name, {}).get(metric) for name in (row, self.baseline)]
        ours, theirs = figures
        return None if ours is None or theirs is None else ours - theirs


def known_families() -> list[str]:
    """The folders of configs/ablations, of this repository or of the working folder."""
    if not _root().is_dir():
        return []
    return sorted(folder.name for folder in _root().iterdir() if _rows(folder))


def find_families(name: str) -> list[Family]:
    """The families that a name stands for.

    Args:
        name: "all", a folder of configs/ablations, or the path of any folder with configs in it;
            "all" are those that are not ``alone``.

    Raises:
        UserError: there is no such folder, no config in it, or its family.json is wrong.
    """
    names = known_families()
    if name == "all":
        if not names:
            raise UserError(f"there is no folder {_CONFIGS} here: name a folder of configs")
        return [family for one in names if not (family := _load(_root() / one)).alone]
    folder = _root() / name if name in names else Path(name)
    if not folder.is_dir():
        hint = did_you_mean(name, names) or f"; there are {', '.join(names)}, or give a folder"
        raise UserError(f"there is no ablation '{name}'{hint}")
    return [_load(folder)]


def _root() -> Path:
    here = Path(__file__).parents[1] / _CONFIGS
    return here if here.is_dir() else _CONFIGS


def _rows(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml") if not p.name.startswith("Base"))


def _load(folder: Path) -> Family:
    rows = _rows(folder)
    if not rows:
        raise UserError(f"folder '{folder}' has no configs: put a .yaml a row into it")
    said = _read(folder / DESCRIPTION)
    where = f"'{folder / DESCRIPTION}'"
    for key in said:
        if key not in _KEYS:
            raise UserError(f"{where} has the unknown key '{key}'{did_you_mean(key, _KEYS)}")
    baseline = said.get("baseline", rows[0])
    order, figures = said.get("order", rows), said.get("rows", {})
    if not isinstance(order, list):
        raise UserError(f"{where}: order is {order!r}: give a list of rows")
    if not _are_figures(figures):
        hint = 'give numbers, as {"ROW": {"mask AP": 30.3}}'
        raise UserError(f"{where}: rows is {json.dumps(figures)[:80]}: {hint}")
    for row in (baseline, *order, *figures):
        if row not in rows:
            hint = did_you_mean(str(row), rows)
            raise UserError(f"{where} names the row '{row}', which has no config{hint}")
    classes = said.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise UserError(f"{where}: classes is {classes!r}: give a list of names")
    # A config that the order does not name comes last, rather than not at all.
    every = dict.fromkeys((*order, *rows))
    return Family(
        name=folder.resolve().name,
        folder=folder,
        rows=tuple(every),
        baseline=baseline,
        title=said.get("title", folder.resolve().name),
        paper=said.get("paper", ""),
        paper_rows=figures,
        alone=said.get("alone", False),
        classes=tuple(dict.fromkeys(classes)),
    )


def _are_figures(rows: Any) -> bool:
    if not isinstance(rows, dict) or not all(isinstance(one, dict) for one in rows.values()):
        return False
    numbers = [number for one in rows.values() for number in one.values()]
    return all(isinstance(number, int | float | None) for number in numbers)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is no JSON object")
    return content
