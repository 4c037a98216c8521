"""Finds the objects in images, folders, videos or a camera's picture, and draws them."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from tqdm import tqdm

from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.prediction import BatchPredictor, SlicedPredictor
from mask_rcnn_plus.prediction.building import read_config
from mask_rcnn_tools.arguments import prepare_output
from mask_rcnn_tools.predict.arguments import parse
from mask_rcnn_tools.predict.drawing import Drawing
from mask_rcnn_tools.predict.ids import category_ids, read_ids
from mask_rcnn_tools.predict.inputs import (
    Shot,
    Source,
    ahead,
    count_shots,
    find_sources,
    open_camera,
    shots,
)
from mask_rcnn_tools.predict.outputs import (
    CUTOUTS,
    IMAGES,
    RESULTS,
    TABLE,
    CocoResults,
    Cutouts,
    Drawings,
    ObjectTable,
    Sink,
    drawn_path,
)


def main(argv: Sequence[str]) -> int:
    """Predicts, and writes what was asked for.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code: 0, or 1 if a file could not be read.

    Raises:
        UserError: an argument does not fit, or something cannot be written.
    """
    # What a broken file makes OpenCV print says less than our line. It read its own variable as it
    # was imported.
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    arguments = parse(argv)
    sources = find_sources(arguments.inputs, recursive=arguments.recursive, output=arguments.output)
    _require_free(arguments, sources)
    cameras = {s.path: open_camera(s.path) for s in sources if s.kind == "camera"}
    cfg = _config(arguments)
    predictor = BatchPredictor(
        cfg,
        batch_size=arguments.batch_size,
        paste=False,
        trust_checkpoint=arguments.trust_checkpoint,
        optimize_to=arguments.optimize,
    )
    wanted = _class_ids(arguments.classes, predictor.class_names)
    predict: Callable[[list[Any]], list[Instances]] = predictor
    if arguments.slice:
        predict = SlicedPredictor(predictor, tile=arguments.slice, overlap=arguments.overlap)
    failed: list[str] = []

    def skip(reason: str) -> None:
        failed.append(reason)
        tqdm.write(f"skipped: {reason}", file=sys.stderr)

    tally = _Tally(sources)
    try:
        with ExitStack() as stack:
            bar = stack.enter_context(tally.bar())
            sinks = _sinks(arguments, cfg, predictor, sources)
            for sink in sinks:
                stack.callback(sink.close)
            try:
                for part in ahead(shots(sources, cameras, skip), arguments.batch_size):
                    found = _predicted(predict, part)
                    for shot, instances in zip(part, found, strict=True):
                        chosen = _chosen(instances.to("cpu"), wanted, arguments.max_detections)
                        for sink in sinks:
                            sink.add(shot, chosen)
                        tally.add(len(chosen))
                        bar.update()
            except KeyboardInterrupt:
                if not cameras:
                    raise
    # Of files that are open all along; what is read has told its own.
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write into --output {arguments.output}: {reason}") from error
    print(tally.line(len(failed), arguments.output))
    return int(bool(failed))


def _require_free(arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Refuses to start where the end would replace an input, or what is there already."""
    folder = arguments.output
    names = []
    if arguments.pictures:
        names += [str(drawn_path(source, folder).relative_to(folder)) for source in sources]
    names += [RESULTS, IMAGES] if arguments.json else []
    names += [TABLE] if arguments.csv else []
    inputs = {Path(source.path).resolve() for source in sources if source.kind != "camera"}
    inputs |= {Path(f).resolve() for f in (arguments.like, arguments.weights) if f is not None}
    for path in (folder / name for name in names):
        if path.resolve() in inputs:
            raise UserError(f"{path} is an input, and would be replaced; name another --output")
    prepare_output(folder, names, overwrite=arguments.overwrite)
    cutouts = folder / CUTOUTS
    if arguments.cutouts and cutouts.exists() and not arguments.overwrite:
        raise UserError(f"{cutouts} exists; name another --output, or give --overwrite")


def _config(arguments: argparse.Namespace) -> CfgNode:
    device = resolve_device(arguments.device, "--device")
    if arguments.optimize == "fp16" and device == "cpu":
        raise UserError(
            "--optimize fp16, which CPUs compute slower than fp32: give bf16, or --device cuda"
        )
    opts = [word for pair in arguments.set for word in pair]
    cfg = read_config(
        arguments.weights,
        arguments.config_file,
        [*opts, "MODEL.DEVICE", device],
        trusted=arguments.trust_checkpoint,
    )
    # What scores less never suppresses what scores more, so the model need not carry it along.
    for group in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        group.SCORE_THRESH_TEST = arguments.score_threshold
    if arguments.classes:
        # Others must not take the places of the wanted ones.
        cfg.TEST.DETECTIONS_PER_IMAGE = -1
    elif arguments.max_detections and not arguments.slice:
        cfg.TEST.DETECTIONS_PER_IMAGE = arguments.max_detections
    return cfg


def _class_ids(given: Sequence[str] | None, names: Sequence[str]) -> list[int] | None:
    if not given:
        return None
    wanted = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not wanted:
        raise UserError("--classes names no class")
    if not names:
        raise UserError("--classes: these weights do not say what their classes are called")
    for name in wanted:
        if name not in names:
            hint = did_you_mean(name, names) or f"; there are {', '.join(names)}"
            raise UserError(f"--classes: the model has no class '{name}'{hint}")
    return [names.index(name) for name in wanted]


def _predicted(predict: Callable[[list[Any]], list[Instances]], part: list[Shot]) -> Any:
    try:
        return predict([shot.image for shot in part])
    except torch.OutOfMemoryError as error:
        sizes = {f"{shot.image.shape[1]} x {shot.image.shape[0]}" for shot in part}
        raise UserError(
            f"out of GPU memory on {len(part)} images of {', '.join(sorted(sizes)[:3])} pixels: "
            "lower --batch-size, or give --slice or --device cpu"
        ) from error


def _chosen(instances: Instances, wanted: list[int] | None, limit: int | None) -> Instances:
    if wanted is not None:
        instances = instances[torch.isin(instances.pred_classes, torch.tensor(wanted))]
    best = torch.sort(instances.scores, descending=True, stable=True).indices
    return instances[best[:limit]]


def _sinks(
    arguments: argparse.Namespace,
    cfg: CfgNode,
    predictor: BatchPredictor,
    sources: Sequence[Source],
) -> list[Sink]:
    names, folder = predictor.class_names, arguments.output
    sinks: list[Sink] = []
    if arguments.json:
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        labels = names or [f"class {index}" for index in range(count)]
        ids, image_ids = category_ids(cfg, labels), None
        if arguments.like is not None:
            ids, image_ids = read_ids(arguments.like, labels, sources)
        sinks.append(CocoResults(folder, labels, ids, image_ids))

    def label(index: int) -> str:
        return names[index] if index < len(names) else f"class {index}"

    if arguments.csv:
        sinks.append(ObjectTable(folder, label))
    if arguments.cutouts:
        sinks.append(Cutouts(folder, label))
    if arguments.pictures:
        parts = {name: getattr(arguments, name) for name in ("masks", "boxes", "labels", "scores")}
        drawing = Drawing(names, **parts)
        sinks.append(Drawings(folder, drawing, lambda line: tqdm.write(line, file=sys.stderr)))
    return sinks


class _Tally:
    """What was done, for the progress bar and the last line."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._total = count_shots(sources)
        self._unit = "image" if all(s.kind == "image" for s in sources) else "frame"
        self._shots = self._objects = 0
        self._since = time.perf_counter()

    def bar(self) -> tqdm:
        # None: only on a terminal.
        return tqdm(total=self._total, unit=self._unit, disable=None, dynamic_ncols=True)

    def add(self, objects: int) -> None:
        self._shots += 1
        self._objects += objects

    def line(self, skipped: int, output: Path) -> str:
        seconds = time.perf_counter() - self._since
        rate = self._shots / seconds if seconds else 0.0
        parts = [
            f"{_counted(self._shots, self._unit)} with {_counted(self._objects, 'object')} in "
            f"{seconds:.1f} s ({rate:.1f} {self._unit}s/s)",
            f"written to {output}",
        ]
        return "; ".join(parts + ([f"{skipped} skipped"] if skipped else []))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
