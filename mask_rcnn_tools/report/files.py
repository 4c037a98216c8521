"""Reads the small files of a run, which may come from someone else, into typed values.

Each file is checked once, against the type that it is read into. A missing file counts as empty.
"""

import csv
import json
import os
import reprlib
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mask_rcnn_plus.config.reading import flatten, parse_plain
from mask_rcnn_plus.data.mask_rules import MAX_COORDINATE, are_numbers, is_number
from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.evaluation.metrics import read_summary as read_rows
from mask_rcnn_plus.evaluation.speed import InferenceSpeed

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: what was evaluated, and with what."""

    json_file: str = ""
    image_root: str = ""
    detections_per_image: int | None = None
    score_threshold: float | None = None
    weights: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    config: str = ""  # YAML


@dataclass(frozen=True)
class Metrics:
    """metrics.json of an evaluation: metric -> value by task, from 0 to 100 or nan; the speed."""

    bbox: dict[str, float] = field(default_factory=dict)
    segm: dict[str, float] = field(default_factory=dict)
    boundary: dict[str, float] = field(default_factory=dict)
    keypoints: dict[str, float] = field(default_factory=dict)
    speed: InferenceSpeed | None = None


def read_json(path: Path, kind: type[T]) -> T:
    """Reads a json file into a dataclass; unknown keys are ignored.

    Raises:
        UserError: the file cannot be read, a value has another type, or a key is missing.
    """
    try:
        return typed(json.loads(read_text(path) or "{}"), kind, "")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: {reason(error)}") from error


def typed(value: Any, kind: Any, where: str) -> Any:
    """Checks and converts a value of a json. Integers become floats where floats are expected.

    Args:
        value: the value.
        kind: the expected type: a dataclass, dict[str, X], X | None, str, int or float.
        where: the keys that lead to the value, each after a dot, for messages.

    Raises:
        ValueError: the value has another type, or a key without a default is missing.
    """
    if get_origin(kind) is UnionType:
        return None if value is None else typed(value, get_args(kind)[0], where)
    if get_origin(kind) is dict:
        part = get_args(kind)[1]
        return {k: typed(v, part, f"{where}.{k:.60}") for k, v in typed(value, dict, where).items()}
    if is_dataclass(kind):
        given = {k: v for k, v in typed(value, dict, where).items() if v is not None}
        types = get_type_hints(kind)
        values = {}
        for f in fields(kind):
            optional = f.default is not MISSING or f.default_factory is not MISSING
            if f.name in given or not optional:
                values[f.name] = typed(given.get(f.name), types[f.name], f"{where}.{f.name}")
        return kind(**values)
    if kind is float and type(value) is int and is_number(value):
        value = float(value)
    too_large = type(value) in (int, float) and not (is_number(value) or value != value)
    if type(value) is not kind or too_large:
        name = where.lstrip(".") or "the content"
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {kind.__name__}")
    if kind is str and not _is_path(value):
        raise ValueError(f"{where.lstrip('.')} has a character that no path may have")
    return value


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def is_box(value: Any) -> bool:
    """Whether a value of a json is a box that can be drawn."""
    return are_numbers(value, 4) and all(abs(number) <= MAX_COORDINATE for number in value)


def read_summary(path: Path) -> list[dict[str, Any]]:
    """Reads summary.csv.

    Raises:
        UserError: the file cannot be read, or has other columns or types.
    """
    if not path.exists():
        return []
    try:
        read_text(path)  # not from a pipe
        return read_rows(path)
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be used: {reason(error)}") from error


def read_settings(text: str, subject: str) -> dict[str, Any]:
    """The full keys of a config and their values.

    Raises:
        UserError: the text is not plain YAML, or is too large.
    """
    return dict(flatten(parse_plain(text, subject))) if text else {}


def read_text(path: Path) -> str:
    """A file's text; "" if it is missing.

    Raises:
        UserError: it cannot be read, or is not a regular file: a pipe would never end.
    """
    try:
        if not path.exists():
            return ""
        if not path.is_file():
            raise OSError(None, "it is not a regular file")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
