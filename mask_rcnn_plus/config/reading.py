"""A YAML config and its ``_BASE_`` chain, read as if a stranger had written them.

Nothing but mappings, lists, strings, numbers, booleans and null comes out, nothing outside the
config root is opened, and whatever the file holds, reading ends soon and in a value or a UserError.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from mask_rcnn_plus.errors import UserError, did_you_mean

# A full dump of all keys has 10 kB, 600 nodes and 5 levels; a model zoo's chain has 3 files.
_MOST_BYTES = 2**20  # of all files of a chain together
_MOST_FILES = 32
_MOST_NODES = 5_000  # of one file, aliases counted each time that they occur
_MOST_LEVELS = 20
_MOST_CHAIN = 8
_MOST_CHARACTERS = 4096  # of one scalar

_BASE = "_BASE_"
_CORE = "tag:yaml.org,2002:"
_TAGS = {_CORE + name for name in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_config_file(config_file: str) -> dict[str, Any]:
    """The keys and values of a YAML config, those of its ``_BASE_`` beneath its own.

    The config root is the nearest folder named ``configs`` above the file, else the file's own
    folder; a ``_BASE_`` (a path, or a list of paths, from the file that names it) lies inside it,
    symbolic links followed.

    Args:
        config_file: path of a ``.yaml`` or ``.yml`` file.

    Returns:
        nested dicts, without ``_BASE_``.

    Raises:
        UserError: there is no such file, it or a base is no plain YAML of keys and values or larger
            than any config, a key occurs twice, or a base is missing, outside the config root, or
            leads back to itself.
    """
    if not config_file:
        raise UserError("no config file: give one with --config-file configs/quickstart.yaml")
    path = Path(config_file)
    subject = f"config file '{config_file}'"
    try:
        if path.is_dir():
            raise UserError(f"{subject} is a folder: name a .yaml file in it")
        _require_yaml(path, subject)
        if not path.is_file():
            siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            raise UserError(f"{subject} does not exist{did_you_mean(config_file, siblings)}")
        path = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # NUL, too long, links in a circle
        raise UserError(f"{subject} cannot be opened: {error}") from error
    return _Chain(subject, _root(path)).read(path, ())


def _root(path: Path) -> Path:
    return next((folder for folder in path.parents if folder.name == "configs"), path.parent)


def read_config_text(text: str, subject: str) -> dict[str, Any]:
    """The keys and values of a YAML config that is no file, and has no ``_BASE_``.

    Args:
        text: such as a checkpoint carries.
        subject: how messages name it.

    Raises:
        UserError: as :func:`read_config_file`, or it has a ``_BASE_``.
    """
    if len(text) > _MOST_BYTES:
        raise UserError(f"{subject} is larger than any config: at most {_MOST_BYTES} characters")
    values = _parse(text, subject)
    if _BASE in values:
        raise UserError(f"{subject} has a _BASE_, which only a file may have")
    return values


def _require_yaml(path: Path, subject: str) -> None:
    if path.suffix == ".py":
        raise UserError(f"{subject}: Lazy (Python) configs are not loaded: write it as YAML")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{subject} has to end in .yaml or .yml")


class _Chain:
    """One config file with all its bases.

    Args:
        subject: how messages name the file that the user gave.
        root: the resolved folder that bases have to lie in.
    """

    def __init__(self, subject: str, root: Path) -> None:
        self._subject = subject
        self._root = root
        self._files = 0
        self._bytes = 0

    def read(self, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """A file over its bases; ``above`` are the resolved files that led to it."""
        subject = f"{self._subject}: its _BASE_ {str(path)!r}" if above else self._subject
        if len(above) > _MOST_CHAIN:
            raise UserError(f"{subject} is number {len(above)} in a row; at most {_MOST_CHAIN} are")
        values = _parse(self._text(path, subject), subject)
        bases = values.pop(_BASE, [])
        merged: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            resolved = self._resolve(base, path)
            if resolved == path or resolved in above:
                raise UserError(f"{self._subject}: its _BASE_ {_short(base)} leads back to itself")
            _merge(self.read(resolved, (*above, path)), merged, subject)
        _merge(values, merged, subject)
        return merged

    def _text(self, path: Path, subject: str) -> str:
        self._files += 1
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise UserError(f"{subject} cannot be read: {error.strerror}") from error
        self._bytes += len(content)
        if self._bytes > _MOST_BYTES or self._files > _MOST_FILES:
            raise UserError(
                f"{self._subject} is larger than any config: it and its bases may have "
                f"{_MOST_BYTES // 2**20} MiB in {_MOST_FILES} files"
            )
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{subject} is no plain YAML: it is not UTF-8: {error}") from error

    def _resolve(self, base: Any, path: Path) -> Path:
        """The file that a ``_BASE_`` of ``path`` names, if it may be read."""
        if not isinstance(base, str) or not base:
            raise UserError(f"{self._subject}: a _BASE_ has to be a path")
        subject = f"{self._subject}: its _BASE_ {_short(base)}"
        if "://" in base:
            raise UserError(f"{subject} is no file: copy it into '{self._root}', and name it there")
        try:
            resolved = (path.parent / Path(base).expanduser()).resolve()
            if not resolved.is_relative_to(self._root):
                raise UserError(
                    f"{subject} leads out of the config root '{self._root}' (the nearest folder "
                    "named 'configs' above the config file, else its own folder)"
                )
            _require_yaml(resolved, subject)
            exists = resolved.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{subject} cannot be opened: {error}") from error
        if not exists:
            raise UserError(f"{subject} does not exist")
        return resolved


def _parse(text: str, subject: str) -> dict[str, Any]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = None if node is None else _Values(loader).build(node, 0)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:300]
        # It quotes the file, whose characters may be anything to a terminal.
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in reason)
        raise UserError(f"{subject} is no plain YAML: {shown}") from error
    except _NotPlainError as error:
        raise UserError(f"{subject} is no plain YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{subject} is not a mapping of keys to values")
    return values


class _NotPlainError(Exception):
    """What a config has no use for, as "line N ..."."""

    def __init__(self, mark: yaml.Mark, what: str) -> None:
        super().__init__(f"line {mark.line + 1} {what}")


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which gives up while it reads and not after it has read everything."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._level = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self._nodes += 1
        self._level += 1
        _require_small(self.peek_event().start_mark, self._nodes, self._level)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


def _require_small(mark: yaml.Mark, nodes: int, level: int) -> None:
    if level > _MOST_LEVELS:
        raise _NotPlainError(mark, f"is nested deeper than {_MOST_LEVELS} levels")
    if nodes > _MOST_NODES:
        raise _NotPlainError(mark, f"is beyond {_MOST_NODES} values (aliases counted in full)")


class _Values:
    """Turns nodes into values. An alias is a node met again, so a few may stand for very many."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._nodes = 0

    def build(self, node: yaml.Node, level: int) -> Any:
        self._nodes += 1
        _require_small(node.start_mark, self._nodes, level)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in _TAGS:
            raise _NotPlainError(node.start_mark, f"has the tag {_short(node.tag)}")
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, level + 1) for item in node.value]
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in values:
                raise _NotPlainError(key_node.start_mark, f"has the key '{key}' a second time")
            values[key] = self.build(value_node, level + 1)
        return values

    def _key(self, node: yaml.Node) -> str:
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise _NotPlainError(node.start_mark, "has a key that is no string")
        if "." in key:
            raise _NotPlainError(
                node.start_mark, f"has the key {_short(key)}: write groups in groups, without dots"
            )
        if not re.fullmatch(r"[\w-]{1,100}", key):
            raise _NotPlainError(node.start_mark, f"has {_short(key)}, which is no key")
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > _MOST_CHARACTERS:
            raise _NotPlainError(
                node.start_mark, f"has a value of more than {_MOST_CHARACTERS} characters"
            )
        # A date is a folder's name here, and "=" is itself.
        if node.tag in (_CORE + "timestamp", _CORE + "value"):
            return node.value
        if node.tag == _CORE + "merge":
            raise _NotPlainError(node.start_mark, "has '<<', which is not read")
        if node.tag not in _TAGS:
            raise _NotPlainError(node.start_mark, f"has the tag {_short(node.tag)}")
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError, OverflowError, yaml.YAMLError) as error:
            kind = node.tag.removeprefix(_CORE)
            raise _NotPlainError(
                node.start_mark, f"has {_short(node.value)}, which is no {kind}"
            ) from error


def _short(text: str) -> str:
    """What a stranger wrote, quoted, without line ends or control characters, and not endless."""
    return repr(text) if len(text) <= 120 else repr(text[:120]) + "..."


def _merge(above: dict[str, Any], below: dict[str, Any], subject: str) -> None:
    """Puts ``above`` into ``below``, in place, group by group."""
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise UserError(f"{subject} has '{key}' as a group of keys, its _BASE_ as a value")
            _merge(value, below[key], subject)
        else:
            below[key] = value
