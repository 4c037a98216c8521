"""Reads a YAML config, its ``_BASE_`` files and ``KEY VALUE`` overrides over the defaults."""

import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from mask_rcnn_plus.config.keys import get_cfg
from mask_rcnn_plus.config.values import check_values
from mask_rcnn_plus.errors import UserError, did_you_mean, did_you_mean_file, reason

_BASE = "_BASE_"
# Limits for a config in a checkpoint. A dump of all keys has 10 kB and 600 values.
_MAX_CHARACTERS = 2**20
_MAX_VALUES = 100_000


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML config over the defaults, then ``KEY VALUE`` pairs over it.

    The file is read as plain YAML, which runs no code.

    Args:
        config_file: path of a YAML file. Its ``_BASE_``, a path or a list of paths relative to the
            file, is read first.
        opts: keys and values in turn, e.g. ``["SOLVER.BASE_LR", "0.01"]``.

    Returns:
        a new, unfrozen config.

    Raises:
        UserError: the file or a base is missing, is not plain YAML or leads back to itself; a key
            is unknown or occurs twice; a value has the wrong type or is out of range.
    """
    if not str(config_file):
        raise UserError("no config file: give one with --config-file configs/quickstart.yaml")
    subject = f"config file '{config_file}'"
    return _over_defaults(_read_file(Path(config_file), subject), subject, opts)


def parse_config(text: str, subject: str, opts: Sequence[str] = ()) -> CfgNode:
    """Like :func:`load_config`, for text from an untrusted source, such as a checkpoint.

    Args:
        text, subject: as for :func:`parse_plain`.

    Raises:
        UserError: as :func:`load_config` and :func:`parse_plain`.
    """
    return _over_defaults(parse_plain(text, subject), subject, opts)


def parse_plain(text: str, subject: str) -> dict[str, Any]:
    """The values of a config from an untrusted source; its keys are not checked.

    The text runs no code, reads no file and cannot grow in memory.

    Args:
        text: the YAML, without ``_BASE_``.
        subject: the name of the config in messages.

    Raises:
        UserError: the text is not plain YAML, has a ``_BASE_`` or is too large.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{subject}: {len(text)} characters, expected at most {_MAX_CHARACTERS}")
    values = _parse(text, subject)
    if _BASE in values:
        raise UserError(f"{subject}: {_BASE} is only supported in files")
    with _one_line(subject):
        if _count(values, {}) > _MAX_VALUES:
            raise UserError(f"{subject}: more than {_MAX_VALUES} values, with aliases expanded")
    return values


def _count(value: Any, counts: dict[int, int]) -> int:
    """The number of values, where an alias counts as often as it occurs."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        items = value.values() if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_count(item, counts) for item in items)
    return counts[id(value)]


def _read_file(path: Path, subject: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file over those of its bases; ``above`` are the files that led to it."""
    values = _parse(_read_text(path, subject), subject)
    bases = values.pop(_BASE, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise UserError(f"{subject}: {_BASE} must be a path or a list of paths, got {base!r}")
        base_subject = f"{subject}: its {_BASE} {base!r}"
        try:
            base_path = path.parent / Path(base).expanduser()
            circular = base_path.resolve() in (path.resolve(), *above)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, an unknown user, looped links
            raise UserError(f"{base_subject} cannot be opened: {reason(error)}") from error
        if circular:
            raise UserError(f"{base_subject} leads back to itself")
        _merge(merged, _read_file(base_path, base_subject, (*above, path.resolve())), subject)
    _merge(merged, values, subject)
    return merged


def _read_text(path: Path, subject: str) -> str:
    try:
        if path.suffix == ".py":
            raise UserError(f"{subject}: Lazy (Python) configs are not loaded: write it as YAML")
        if path.is_dir():
            raise UserError(f"{subject} is a folder: name a .yaml file in it")
        if not path.is_file():
            siblings = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
            raise UserError(f"{subject} does not exist{did_you_mean_file(path, siblings)}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # a NUL or a loop of links in the path
        raise UserError(f"{subject} cannot be opened: {reason(error)}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but it refuses a key that occurs twice and reads a date as a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            problem = ""
            if key.value in keys:
                problem = f"the key {key.value!r} occurs a second time"
            elif "." in key.value:
                problem = f"the key {key.value!r} contains a dot: write groups in groups"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def _parse(text: str, subject: str) -> dict[str, Any]:
    with _one_line(f"{subject} is not plain YAML"):
        values = yaml.load(text, _Loader)
    if not isinstance(values, dict):
        raise UserError(f"{subject} is not a mapping of keys to values")
    return values


def _merge(base: dict[str, Any], values: dict[str, Any], subject: str) -> None:
    """Replaces values of the base, in place, group by group."""
    for key, value in values.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise UserError(f"{subject}: '{key}' is a group of keys here, a value in {_BASE}")
            _merge(base[key], value, subject)
        else:
            base[key] = value


def _over_defaults(values: dict[str, Any], subject: str, opts: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    known = dict(flatten(cfg))
    # detectron2 guesses the version, with a warning, if it is missing. All of ours are 2.
    if (version := values.pop("VERSION", 2)) != 2:
        advice = "convert it to VERSION 2" if version in (0, 1) else "only VERSION 2 is supported"
        raise UserError(f"{subject} has VERSION {version}: {advice}")
    if isinstance(solver := values.get("SOLVER"), dict):
        solver.pop("ACCUMULATE_EXACT", None)  # in configs that an earlier version saved
    with _one_line(subject):
        _check_keys((key for key, _ in flatten(values)), known, subject)
        _fit_types(values, known, f"{subject}: ")
        # Not merge_from_file, which may read the file again with yaml.unsafe_load.
        cfg.merge_from_other_cfg(CfgNode(values))
    _merge_opts(cfg, list(opts), known)
    with _one_line(subject):
        check_values(dict(flatten(cfg)), known)
    return cfg


def _merge_opts(cfg: CfgNode, opts: list[str], known: Mapping[str, Any]) -> None:
    for item in opts[0::2]:
        if item.startswith("-"):
            raise UserError(f"option '{item}' follows a config override: put options first")
    _check_keys(opts[0::2], known, "the command line")
    if len(opts) % 2:
        raise UserError(f"config key '{opts[-1]}' on the command line has no value")
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        bare = isinstance(known[key], tuple | list) and not value.startswith(("(", "["))
        hint = f"; write \"('{value}',)\"" if bare else ""
        with _one_line(f"{key} {value}", hint):
            fitted = _fit(key, cfg._decode_cfg_value(value), known[key], hint=hint)
            # yacs decodes a string itself.
            cfg.merge_from_list([key, value if isinstance(fitted, str) else fitted])


_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


def _fit_types(values: dict[str, Any], known: Mapping[str, Any], subject: str, above: str = ""):
    """Gives each value of a config file the type of its default, in place."""
    for key, value in values.items():
        if isinstance(value, dict):
            _fit_types(value, known, subject, f"{above}{key}.")
        else:
            default = known[f"{above}{key}"]
            fitted = _fit(f"{subject}{above}{key}", CfgNode._decode_cfg_value(value), default)
            values[key] = value if isinstance(fitted, str) else fitted


def _fit(name: str, value: Any, default: Any, *, hint: str = "") -> Any:
    """A value in the type of its default; yacs would refuse an integer for a number."""
    lists = (list, tuple)
    if type(value) is int and type(default) is float:
        return float(value)
    if type(value) is type(default) or default is None or value is None:
        return value
    if isinstance(value, lists) and isinstance(default, lists):
        return value
    kind = _KINDS.get(type(default), "a list")
    raise UserError(f"{name} is {reprlib.repr(value)}: it must be {kind}{hint}")


@contextmanager
def _one_line(subject: str, hint: str = "") -> Iterator[None]:
    """Turns errors of PyYAML and yacs into a UserError of one line."""
    try:
        # yacs reads each string as a Python literal; backslashes in it cause warnings.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{subject}: a value is nested too deeply") from error
    except (
        *(yaml.YAMLError, ValueError, AssertionError, TypeError, AttributeError),
        *(LookupError, OverflowError, SyntaxError),
    ) as error:
        # str() of a KeyError adds quotation marks; yacs prints types as "<class 'int'>".
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
            problem = f"{error.problem}".replace("'<stream end>'", "the end of the file")
            text = f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
        elif isinstance(error, yaml.reader.ReaderError):
            text = f"the character {error.character:#x} at position {error.position} is not allowed"
        text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(text.split()))
        if len(text) > 300:  # yacs names the key at the end
            text = f"{text[:150]} ... {text[-150:]}"
        raise UserError(f"{subject}: {text or type(error).__name__}{hint}") from error


def _check_keys(keys: Iterable[str], known: Mapping[str, Any], where: str) -> None:
    groups = {key.rsplit(".", depth)[0] for key in known for depth in range(1, 1 + key.count("."))}
    for key in keys:
        if key in groups:
            raise UserError(f"'{key}' in {where} is a group of keys, not a key with a value")
        if key not in known:
            raise UserError(f"{where} has the unknown key '{key}'{did_you_mean(key, known)}")


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The full keys of nested settings, such as a config, and their values."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
