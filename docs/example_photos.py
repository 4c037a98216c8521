"""Draws example photos for the tutorial, with labels in labelme's format, and a short video.

Usage: ``python docs/example_photos.py photos --number 120``
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from mask_rcnn_plus.data.drawing import Drawn, draw_image
from mask_rcnn_plus.data.outlines import mask_to_polygons

_SIDE = 128  # of an image, in pixels
_FRAMES = 48  # of the video


def _labels(name: str, objects: list[Drawn]) -> dict:
    """The labels of one image in labelme's format."""
    shapes = [
        {
            "label": drawn.kind,
            "points": np.reshape(polygon, (-1, 2)).tolist(),
            "group_id": index,  # the same for all parts of an object
            "shape_type": "polygon",
            "flags": {},
        }
        for index, drawn in enumerate(objects)
        for polygon in mask_to_polygons(drawn.mask)
    ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": name,
        "imageData": None,
        "imageHeight": _SIDE,
        "imageWidth": _SIDE,
    }


def _write_video(path: Path, rng: np.random.Generator) -> None:
    """Writes a video in which the camera moves over a wide drawing."""
    wide, _ = draw_image(rng, (_SIDE, 2 * _SIDE))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, (_SIDE, _SIDE))
    for left in np.linspace(0, _SIDE, _FRAMES).round().astype(int):
        writer.write(np.ascontiguousarray(wide[:, left : left + _SIDE]))
    writer.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--number", type=int, default=300, help="number of images (default: 300)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(args.number), desc="drawing", unit="image"):
        image, objects = draw_image(np.random.default_rng([7, index]), (_SIDE, _SIDE))
        name = f"{index:04}.jpg"
        cv2.imwrite(str(args.folder / name), image)
        labels = json.dumps(_labels(name, objects))
        (args.folder / name).with_suffix(".json").write_text(labels)
    _write_video(args.folder / "clip.mp4", np.random.default_rng(8))


if __name__ == "__main__":
    main()
