"""The kinds of problems that the data check knows, and how it collects problems."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        severity: "error": training or evaluation fails, is wrong, or silently loses an object;
            "warning": they work, but perhaps not as intended; "note": good to know.
        text: explains the problem; the subject is plural.
        repair: what repair does about it; "" if it changes nothing.
    """

    severity: str
    text: str
    repair: str = ""


_DROP = "removes the annotation"
_NEW_ID = "an annotation gets a new id; other entries are removed"
_REFERENCE = 'changes "5" to 5 if the id 5 exists; otherwise ' + _DROP
_DROP_IMAGE = "removes the image and its annotations"
_BOX = "computes the box from the mask; without a mask " + _DROP
_POLYGON = "removes the polygon, and the annotation if no polygon is left"

KINDS: dict[str, Kind] = {
    # The file.
    "no-json": Kind(ERROR, "the file is not valid JSON"),
    "no-coco": Kind(ERROR, "the file is not in COCO format"),
    "no-images": Kind(ERROR, "the file lists no images"),
    # Entries and ids.
    "entry": Kind(ERROR, "entries are not JSON objects", "removes the entry"),
    "id-missing": Kind(ERROR, "entries have no id", _NEW_ID),
    "id-type": Kind(
        ERROR,
        "ids are not whole numbers",
        "replaces the id by a whole number, also where other entries refer to it",
    ),
    "id-duplicate": Kind(ERROR, "entries have the same id as an earlier entry", _NEW_ID),
    "id-zero": Kind(
        WARNING,
        "annotations have the id 0, which other COCO evaluators treat as 'no match'; the evaluator "
        "of this package uses a new id",
        "gives the annotation a new id",
    ),
    "unknown-image": Kind(ERROR, "annotations refer to an image not in 'images'", _REFERENCE),
    "unknown-category": Kind(
        ERROR, "annotations refer to a category not in 'categories'", _REFERENCE
    ),
    "category-name": Kind(ERROR, "categories have no valid name", "names it category_ID"),
    "category-twin": Kind(
        WARNING, "categories have the same name as an earlier one; they are separate classes"
    ),
    "category-gap": Kind(
        NOTE, "category ids are not 1, 2, 3, ...; the model numbers the classes from 0 in id order"
    ),
    "category-unused": Kind(NOTE, "categories have no annotations"),
    # Masks.
    "no-masks": Kind(NOTE, "no annotation has a mask; train with MODEL.MASK_ON False"),
    "mask-missing": Kind(
        ERROR, "annotations have no segmentation, although other annotations have one", _DROP
    ),
    "mask-type": Kind(ERROR, "segmentations are neither polygons nor RLE", _DROP),
    "mask-flat": Kind(
        ERROR, "segmentations are one polygon, not a list of polygons", "puts it into a list"
    ),
    "polygon-type": Kind(ERROR, "polygons are not lists of numbers", _POLYGON),
    "polygon-short": Kind(ERROR, "polygons have fewer than 6 numbers (3 corners)", _POLYGON),
    "polygon-odd": Kind(ERROR, "polygons have an odd number of coordinates", _POLYGON),
    "polygon-nan": Kind(ERROR, "polygons have a coordinate that is NaN or infinite", _POLYGON),
    "polygon-absurd": Kind(
        ERROR, "polygons reach extremely far outside the image or are extremely long", _POLYGON
    ),
    "polygon-flat": Kind(WARNING, "polygons have no area", _POLYGON),
    "mask-outside": Kind(ERROR, "masks lie completely outside their image", _DROP),
    "mask-over-edge": Kind(
        WARNING, "masks extend beyond the edge of their image; training cuts them off"
    ),
    "mask-empty": Kind(WARNING, "masks have no pixels; training leaves them out", _DROP),
    "rle-size": Kind(ERROR, "RLE masks have a different size than their image", _DROP),
    "rle-counts": Kind(
        ERROR, "RLE masks are invalid: their run lengths do not add up to the image", _DROP
    ),
    "rle": Kind(NOTE, "masks are RLE; INPUT.MASK_FORMAT bitmask trains on them faster"),
    # Boxes.
    "box-type": Kind(ERROR, "boxes are not lists of four numbers", _BOX),
    "box-nan": Kind(ERROR, "boxes have a number that is NaN, infinite or extremely large", _BOX),
    "box-negative": Kind(ERROR, "boxes have a negative width or height", _BOX),
    "box-xyxy": Kind(
        ERROR, "boxes are [x0, y0, x1, y1] instead of [x, y, width, height]", "converts the box"
    ),
    "box-normalised": Kind(
        ERROR, "boxes are fractions of the image size instead of pixels", "converts to pixels"
    ),
    "box-outside": Kind(ERROR, "boxes lie completely outside their image", _BOX),
    "box-empty": Kind(WARNING, "boxes have a width or height of 0; training leaves them out", _BOX),
    "box-over-edge": Kind(
        WARNING, "boxes extend beyond the edge of their image; training cuts them off"
    ),
    "box-mask": Kind(WARNING, "boxes do not match their masks", "computes the box from the mask"),
    # The other fields of an annotation.
    "crowd-flag": Kind(ERROR, "'iscrowd' is neither 0 nor 1", "sets it to 1 if true, else to 0"),
    "crowd-missing": Kind(NOTE, "annotations have no 'iscrowd'; it counts as 0", "sets it to 0"),
    "crowd-polygons": Kind(
        NOTE, "crowds (iscrowd 1) have polygons; COCO uses RLE for crowds, but both work"
    ),
    "crowd-only": Kind(WARNING, "images have only crowd annotations; training leaves them out"),
    "ignore": Kind(
        ERROR,
        "annotations have 'ignore', which detectron2 does not support",
        "replaces it by iscrowd 1",
    ),
    "area": Kind(
        ERROR, "areas are not numbers of at least 0", "computes the area from the mask or the box"
    ),
    "area-missing": Kind(
        NOTE,
        "annotations have no 'area'; evaluation computes it",
        "computes the area from the mask or the box",
    ),
    "keypoints": Kind(
        ERROR,
        "keypoints are not a list of x, y, visibility for each keypoint name",
        "removes the keypoints",
    ),
    "twin": Kind(WARNING, "annotations are exact copies of an earlier one", _DROP),
    # Images, as the json describes them.
    "image-field": Kind(
        ERROR,
        "images have no valid file_name, height or width",
        "reads height and width from the image file; if that fails, " + _DROP_IMAGE,
    ),
    "image-twin": Kind(WARNING, "images have the same file_name as an earlier one"),
    "image-empty": Kind(NOTE, "images have no annotations; training leaves them out by default"),
    # Image files.
    "file-outside": Kind(
        ERROR,
        "image files are outside the image folder ('..', an absolute path or a link)",
        _DROP_IMAGE,
    ),
    "file-missing": Kind(ERROR, "image files are missing", _DROP_IMAGE),
    "file-unreadable": Kind(ERROR, "image files cannot be read as images", _DROP_IMAGE),
    "file-truncated": Kind(ERROR, "image files are truncated or damaged", _DROP_IMAGE),
    "file-bomb": Kind(
        ERROR,
        "images have more pixels than the limit (--max-pixels, INPUT.MAX_PIXELS)",
        _DROP_IMAGE,
    ),
    "file-size": Kind(
        ERROR,
        "image files have a different size than the json says",
        "corrects the size in the json if all annotations fit into it; otherwise " + _DROP_IMAGE,
    ),
    "file-rotated": Kind(
        ERROR,
        "images are rotated by their EXIF orientation, but the size in the json is not; save them "
        "upright",
        _DROP_IMAGE,
    ),
    "file-thin": Kind(ERROR, "images have a width or height of 1 pixel", _DROP_IMAGE),
    "file-deep": Kind(
        WARNING,
        "images have more than 8 bits per channel; reading scales them to 8 bits as "
        "INPUT.SIXTEEN_BIT says",
    ),
    "file-cmyk": Kind(
        WARNING, "images are CMYK; reading converts them to RGB without a colour profile"
    ),
    "file-alpha": Kind(NOTE, "images have transparency; reading drops it"),
    "leak": Kind(WARNING, "the same images are in another one of the data sets"),
}


_ORDER = {kind: rank for rank, kind in enumerate(KINDS)}


class Problem(NamedTuple):
    """One problem in a data set.

    Attributes:
        kind: a key of ``KINDS``.
        section: the json's list that the entry is in; "" for a problem of the whole file.
        position: index of the entry in that list.
        id: the id of the entry.
        image_id, file_name: the image that the entry is or belongs to, as in the json.
        detail: the end of a sentence whose subject is the entry, such as "has the id 0"; for a
            problem of the whole file, a full sentence.
    """

    kind: str
    section: str = ""
    position: int = -1
    id: Any = None
    image_id: Any = None
    file_name: Any = None
    detail: str = ""


def by_kind(problem: Problem) -> int:
    """Sort key: the order of ``KINDS``."""
    return _ORDER[problem.kind]


def is_error(problem: Problem) -> bool:
    """Whether the problem is of a kind with severity "error"."""
    return KINDS[problem.kind].severity == ERROR


def is_key(value: object) -> bool:
    """Whether a value can be looked up as an id, although an id should be a whole number."""
    return type(value) in (int, str, float)


@dataclass
class Problems:
    """Collects the problems of a json.

    Attributes:
        content: the json's content, with the three lists of the COCO format.
        items: the problems.
        images: the image of each valid image id.
    """

    content: dict[str, Any]
    items: list[Problem] = field(default_factory=list)
    images: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, section: str, position: int, detail: str = "") -> None:
        """Adds a problem of an entry; the arguments are those of ``Problem``."""
        entry = self.content[section][position]
        if not isinstance(entry, dict):
            entry = {}
        image = entry if section == "images" else {}
        if section == "annotations" and is_key(key := entry.get("image_id")):
            image = self.images.get(key, {"id": key})
        ids = (entry.get("id"), image.get("id"), image.get("file_name"))
        self.items.append(Problem(kind, section, position, *ids, detail))


@dataclass
class Annotations:
    """The annotations whose image and category exist; only these are checked further.

    Attributes:
        problems: collects the problems.
        positions: index of each annotation in the json's list.
        entries: the annotations.
        sizes: (height, width) of each annotation's image; None if the json has no valid size.
    """

    problems: Problems
    positions: list[int] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)

    def add_problem(self, kind: str, index: int, detail: str = "") -> None:
        """Adds a problem of ``entries[index]``."""
        self.problems.add(kind, "annotations", self.positions[index], detail)
