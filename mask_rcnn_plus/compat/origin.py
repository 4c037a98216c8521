"""Identifies the installed detectron2: upstream's v0.6, a source install, or a redistribution."""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

# The SHA-256 of upstream's tag v0.6: of the lines "<sha256 of the file>  <path>" of every *.py in
# detectron2/ except its projects/, sorted by path.
UPSTREAM_0_6 = "7d212cd90e780b29c77f7cbe6fb0cd1fda3bbf859d54ad86c214182e612aa0da"
# These lines, to name the files that differ.
_TABLE = Path(__file__).with_name("detectron2_0_6.sha256")
_NAMES_IN_MESSAGE = 10


@dataclass(frozen=True)
class Origin:
    """The origin of the installed detectron2.

    Attributes:
        kind: "upstream 0.6" (the same files, from any package), "source" (a checkout, or installed
            from one) or "redistribution" (from a package registry).
        distribution: name and version of the installed distribution; "" for a bare source tree.
        differing: the files that differ from upstream's v0.6, are missing or are additional,
            sorted; empty for another version than 0.6.
    """

    kind: str
    distribution: str
    differing: tuple[str, ...]


@lru_cache(maxsize=1)
def detectron2_origin() -> Origin:
    """The origin of the installed detectron2. Reads its 140 files (1 MB)."""
    spec = find_spec("detectron2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("detectron2 is not installed", name="detectron2")
    return origin_of(Path(spec.origin).parent)


def origin_of(package: Path) -> Origin:
    """The origin of a package ``detectron2``.

    Args:
        package: the folder that contains ``__init__.py``.
    """
    distribution = _distribution(package)
    name = f"{distribution.metadata['Name']} {distribution.version}" if distribution else ""
    listing = _listing(package)
    if hashlib.sha256(listing.encode()).hexdigest() == UPSTREAM_0_6:
        return Origin("upstream 0.6", name, ())
    if distribution is None or _from_source(distribution) or (package.parent / ".git").exists():
        kind = "source"
    else:
        kind = "redistribution"
    if distribution is not None and not re.match(r"0\.6(\.0)*(\+|$)", distribution.version):
        return Origin(kind, name, ())
    here, upstream = set(listing.splitlines()), set(_TABLE.read_text(encoding="utf-8").splitlines())
    return Origin(kind, name, tuple(sorted({line.split("  ", 1)[1] for line in here ^ upstream})))


def check_detectron2() -> Origin:
    """Warns if a redistribution of detectron2 0.6 differs from upstream's files."""
    origin = detectron2_origin()
    if origin.kind == "redistribution" and origin.differing:
        rest = len(origin.differing) - _NAMES_IN_MESSAGE
        names = ", ".join(origin.differing[:_NAMES_IN_MESSAGE])
        logger.warning(
            f"the installed detectron2 ({origin.distribution}) is not upstream's v0.6: "
            f"{len(origin.differing)} files differ: {names}"
            + (f" and {rest} more" if rest > 0 else "")
            + "; what this project says about detectron2 0.6 may be wrong"
        )
    return origin


def _listing(package: Path) -> str:
    paths = {
        path.relative_to(package).as_posix(): path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "projects"
    }
    return "".join(
        f"{hashlib.sha256(paths[name].read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(paths)
    )


def _distribution(package: Path) -> metadata.Distribution | None:
    """The distribution that the package was installed from, whatever its name."""
    # By the folder's name, because opening the metadata of all distributions takes long.
    for folder in sorted(package.parent.glob("*.dist-info")):
        if re.fullmatch(r"(.*[-_.])?detectron2-[^-]+\.dist-info", folder.name, re.IGNORECASE):
            return metadata.Distribution.at(folder)
    # An editable install has its metadata elsewhere, under upstream's name.
    return next(iter(metadata.distributions(name="detectron2")), None)


def _from_source(distribution: metadata.Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    if not text:
        return False
    try:
        source = json.loads(text)
    except ValueError:
        return False
    return isinstance(source, dict) and bool(source.keys() & {"dir_info", "vcs_info"})
