"""Cleans class names that people typed: spaces, capitals, labels that are not classes."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from mask_rcnn_tools.convert.labels import LabelledObject, Labels

# labelme's labels for regions to ignore and for the background.
_NOT_CLASSES = ("__ignore__", "_background_")


def clean_name(name: str) -> str:
    """A class name without spaces around it or repeated within it, in Unicode's form NFC."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def clean_classes(labels: Labels, wanted: Sequence[str] | None) -> None:
    """Cleans the class names, removes objects whose label is not a class, and notes both.

    Args:
        labels: changed in place.
        wanted: the names in --classes, which always count as classes.
    """
    for image in labels.images:
        image.objects = [
            labelled
            for labelled in image.objects
            if _is_kept(labelled, image.name, labels, wanted or ())
        ]
    labels.categories = {clean_name(name): more for name, more in labels.categories.items()}
    if labels.classes is not None:
        originals = {clean_name(name): name for name in reversed(labels.classes)}
        labels.classes = [
            clean_name(name)
            for name in labels.classes
            if name == originals[clean_name(name)]  # "cat " after "cat" is the same class
            and (clean_name(name) not in _NOT_CLASSES or clean_name(name) in (wanted or ()))
        ]
    counts = Counter(labelled.label for image in labels.images for labelled in image.objects)
    twins: dict[str, list[str]] = {}
    for name in sorted(counts):
        twins.setdefault(name.casefold(), []).append(f"'{name}' ({counts[name]} objects)")
    for names in twins.values():
        if len(names) > 1:
            what = "classes differ only in capitals; if they are one class, rename it in the source"
            labels.note(what, ", ".join(names))
    if wanted and len(wanted) == 1 and "," in wanted[0]:
        labels.note(
            "--classes has one name, with a comma; separate several names with spaces", wanted[0]
        )


def _is_kept(labelled: LabelledObject, image: str, labels: Labels, wanted: Sequence[str]) -> bool:
    """Cleans the class name of an object. Returns whether the object is kept."""
    name = clean_name(labelled.label)
    if name != labelled.label:
        what = "labels have extra spaces or another Unicode form (corrected)"
        labels.note(what, f"{image}: '{labelled.label}'")
        labelled.label = name
    if not name:
        labels.skip("objects have no class name", image)
    elif name in _NOT_CLASSES and name not in wanted:
        what = f"objects with the label {name}, which is not a class, are left out"
        labels.note(what, image)
        return False
    return bool(name)
