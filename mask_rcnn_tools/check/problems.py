"""The kinds of problems that the data check knows, and the problems that it has found."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        severity: "error": training or evaluation would fail, be wrong, or lose an object unsaid;
            "warning": they work, but perhaps not as meant; "note": worth knowing.
        text: what is so, said of several entries.
        mended: what repair mode does about it; "" leaves it as it is.
    """

    severity: str
    text: str
    mended: str = ""


_DROP = "the annotation is dropped"
_REFER = '"5" becomes 5 where that is one; else ' + _DROP
_DROP_IMAGE = "the image and its annotations are dropped"
_BOX = "the box is taken from the mask; without one the annotation is dropped"
_POLYGON = "the polygon is dropped, and the annotation where none is left"

KINDS: dict[str, Kind] = {
    # The file.
    "no-json": Kind(ERROR, "the file cannot be read as json"),
    "no-coco": Kind(ERROR, "the file is not in COCO format"),
    "no-images": Kind(ERROR, "there are no images"),
    # Entries and ids.
    "entry": Kind(ERROR, "entries are no objects", "the entry is dropped"),
    "id-missing": Kind(
        ERROR, "ids are missing", "an annotation gets a new id, anything else is dropped"
    ),
    "id-type": Kind(ERROR, "ids are no whole numbers", "numbered; what refers to the id follows"),
    "id-duplicate": Kind(
        ERROR,
        "ids are those of an earlier entry",
        "an annotation gets a new id, anything else is dropped",
    ),
    "id-zero": Kind(
        WARNING,
        "annotation id 0 counts as no match in COCO's evaluators; ours gives it another id",
        "the annotation gets a new id",
    ),
    "unknown-image": Kind(ERROR, "annotations of images that are not in 'images'", _REFER),
    "unknown-category": Kind(ERROR, "annotations of categories not in 'categories'", _REFER),
    "category-name": Kind(ERROR, "categories have no name", "named category_ID"),
    "category-twin": Kind(WARNING, "categories have the name of an earlier one: separate classes"),
    "category-gap": Kind(NOTE, "category ids are not 1, 2, 3, ...: numbered from 0 in their order"),
    "category-unused": Kind(NOTE, "categories have no annotation"),
    # Masks.
    "no-masks": Kind(NOTE, "no annotation has a mask: train with MODEL.MASK_ON False"),
    "mask-missing": Kind(ERROR, "annotations have no segmentation, while others do", _DROP),
    "mask-type": Kind(ERROR, "segmentations are neither polygons nor run lengths", _DROP),
    "mask-flat": Kind(
        ERROR, "segmentations are a polygon, not a list of polygons", "put into a list"
    ),
    "polygon-type": Kind(ERROR, "polygons are no lists of numbers", _POLYGON),
    "polygon-short": Kind(ERROR, "polygons have fewer than 6 numbers (3 corners)", _POLYGON),
    "polygon-odd": Kind(ERROR, "polygons have an odd number of coordinates", _POLYGON),
    "polygon-nan": Kind(ERROR, "polygons have coordinates that are not finite", _POLYGON),
    "polygon-absurd": Kind(ERROR, "polygons lie or reach absurdly far off", _POLYGON),
    "polygon-flat": Kind(WARNING, "polygons enclose no area", _POLYGON),
    "mask-outside": Kind(ERROR, "masks lie wholly outside their image", _DROP),
    "mask-over-edge": Kind(WARNING, "masks reach over their image's edge: cut off in training"),
    "mask-empty": Kind(WARNING, "masks have no pixel: left out in training", _DROP),
    "rle-size": Kind(ERROR, "run lengths are of another size than their image", _DROP),
    "rle-counts": Kind(ERROR, "run lengths do not fill their image", _DROP),
    "rle": Kind(NOTE, "masks are run lengths: INPUT.MASK_FORMAT bitmask trains on them faster"),
    # Boxes.
    "box-type": Kind(ERROR, "boxes are not four numbers", _BOX),
    "box-nan": Kind(ERROR, "boxes have numbers that are not finite", _BOX),
    "box-negative": Kind(ERROR, "boxes have a negative width or height", _BOX),
    "box-xyxy": Kind(ERROR, "boxes are [x0, y0, x1, y1], not [x, y, width, height]", "converted"),
    "box-normalised": Kind(ERROR, "boxes are fractions of the image, not pixels", "scaled"),
    "box-outside": Kind(ERROR, "boxes lie wholly outside their image", _BOX),
    "box-empty": Kind(WARNING, "boxes have no width or height: left out in training", _BOX),
    "box-over-edge": Kind(WARNING, "boxes reach over their image's edge: cut off in training"),
    "box-mask": Kind(WARNING, "boxes disagree with their masks", "the box is taken from the mask"),
    # What else an annotation has.
    "crowd-flag": Kind(ERROR, "'iscrowd' is neither 0 nor 1", "1 for what is true, else 0"),
    "crowd-missing": Kind(NOTE, "annotations have no 'iscrowd': taken as 0", "set to 0"),
    "crowd-polygons": Kind(NOTE, "crowds are polygons, where COCO has run lengths: taken as such"),
    "crowd-only": Kind(WARNING, "images have crowds alone: left out in training"),
    "ignore": Kind(
        ERROR, "annotations have 'ignore', which detectron2 refuses", "made a crowd (iscrowd 1)"
    ),
    "area": Kind(ERROR, "areas are no numbers from 0 up", "computed from the mask or the box"),
    "area-missing": Kind(NOTE, "annotations have no 'area': computed when evaluated", "computed"),
    "keypoints": Kind(
        ERROR, "keypoints are not x, y, visibility for each name", "the keypoints are taken off"
    ),
    "twin": Kind(WARNING, "annotations repeat an earlier one exactly", _DROP),
    # Images, as the json has them.
    "image-field": Kind(
        ERROR,
        "images have no usable file_name, height or width",
        "height and width are read from the file; without one " + _DROP_IMAGE,
    ),
    "image-twin": Kind(WARNING, "images have the file_name of an earlier one"),
    "image-empty": Kind(NOTE, "images have no annotation: left out in training by default"),
    # Images, as they lie on disk.
    "file-outside": Kind(
        ERROR, "files lie outside the image folder ('..', absolute, link)", _DROP_IMAGE
    ),
    "file-missing": Kind(ERROR, "files are missing", _DROP_IMAGE),
    "file-unreadable": Kind(ERROR, "files are no images that can be read", _DROP_IMAGE),
    "file-truncated": Kind(ERROR, "images are truncated or damaged", _DROP_IMAGE),
    "file-bomb": Kind(ERROR, "images have more pixels than Pillow opens", _DROP_IMAGE),
    "file-size": Kind(
        ERROR,
        "images have another size than the json says",
        "the json's is set right where all annotations fit in; else " + _DROP_IMAGE,
    ),
    "file-rotated": Kind(
        ERROR,
        "images are turned by their EXIF orientation, their json is not: save them upright",
        _DROP_IMAGE,
    ),
    "file-thin": Kind(ERROR, "images have a side of 1 pixel", _DROP_IMAGE),
    "file-deep": Kind(
        WARNING, "images have more than 8 bits a channel: clipped to 255 when read, not scaled"
    ),
    "file-cmyk": Kind(WARNING, "images are CMYK: their colours are converted without a profile"),
    "file-alpha": Kind(NOTE, "images have transparency: dropped when read"),
    "leak": Kind(WARNING, "images are also in another of the data sets"),
}


class Problem(NamedTuple):
    """One problem. What it does not concern is None.

    Attributes:
        kind: a key of ``KINDS``.
        section: the json's list, or "" for the file itself.
        position: of the entry in that list, from 0.
        id: the entry's.
        image_id, file_name: of the image that it is, or belongs to, as the json has them.
        detail: the end of a sentence that starts with the entry: "has the width 0, ...".
    """

    kind: str
    section: str = ""
    position: int = -1
    id: Any = None
    image_id: Any = None
    file_name: Any = None
    detail: str = ""


@dataclass
class Findings:
    """Collects the problems of a json.

    Args:
        content: the json's, with its three lists.
    """

    content: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)
    # Image id -> the image, of those whose id can be referred to.
    images: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, section: str, index: int, detail: str = "") -> None:
        """Adds a problem of an entry.

        Args:
            kind, section, detail: as in ``Problem``.
            index: its position.
        """
        entry = self.content[section][index]
        image: Any = None
        if isinstance(entry, dict):
            if section == "images":
                image = entry
            elif section == "annotations" and type(entry.get("image_id")) in (int, str, float):
                image = self.images.get(entry["image_id"], {"id": entry["image_id"]})
        else:
            entry = {}
        image = image or {}
        self.problems.append(
            Problem(
                kind,
                section,
                index,
                entry.get("id"),
                image.get("id"),
                image.get("file_name"),
                detail,
            )
        )

    def kinds(self) -> Counter[str]:
        """How many problems there are of each kind."""
        return Counter(problem.kind for problem in self.problems)
