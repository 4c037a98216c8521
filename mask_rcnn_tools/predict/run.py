"""Reads images, predicts on them, and writes the outputs."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from tqdm import tqdm

from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.prediction import BatchPredictor, SlicedPredictor
from mask_rcnn_plus.prediction.building import read_config
from mask_rcnn_tools.arguments import prepare_output, writing
from mask_rcnn_tools.predict.inputs import (
    Frame,
    Source,
    count_frames,
    find_sources,
    open_camera,
    prefetch_batches,
    read_frames,
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
    Output,
    category_ids,
    class_label,
    drawing_path,
    read_ids,
)


def run(arguments: argparse.Namespace) -> int:
    """Predicts and writes: returns 1 if a file could not be read, else 0."""
    limit_pixels(arguments.max_pixels)
    sources = find_sources(arguments.inputs, recursive=arguments.recursive, output=arguments.output)
    _check_output(arguments, sources)
    cameras = {s.path: open_camera(s.path) for s in sources if s.kind == "camera"}
    cfg = _config(arguments)
    predictor = BatchPredictor(
        cfg,
        batch_size=arguments.batch_size,
        paste=False,
        trust_checkpoint=arguments.trust_checkpoint,
        optimize_to=arguments.optimize,
    )
    class_ids = _class_ids(arguments.classes, predictor.class_names)
    predict: Callable[[list[Any]], list[Instances]] = predictor
    if arguments.slice:
        predict = SlicedPredictor(predictor, tile=arguments.slice, overlap=arguments.overlap)
    unit = "image" if all(source.kind == "image" for source in sources) else "frame"
    skipped = frames = objects = 0

    def skip(reason: str) -> None:
        nonlocal skipped
        skipped += 1
        _log(f"skipped: {reason}")

    start = time.perf_counter()
    with writing(arguments.output, "write into --output"), ExitStack() as stack:
        total = count_frames(sources)
        # disable=None: show the bar only on a terminal.
        bar = stack.enter_context(tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True))
        outputs = _outputs(arguments, cfg, predictor, sources)
        for output in outputs:
            stack.callback(output.close)
        try:
            frames_read = read_frames(sources, cameras, skip, sixteen_bit=predictor.sixteen_bit)
            for batch in prefetch_batches(frames_read, arguments.batch_size):
                for frame, instances in zip(batch, _predict(predict, batch), strict=True):
                    kept = _select(instances.to("cpu"), class_ids, arguments.max_detections)
                    for output in outputs:
                        output.add(frame, kept)
                    frames += 1
                    objects += len(kept)
                    bar.update()
                del frame  # and its image, before the next one is read
        except KeyboardInterrupt:
            if not cameras:
                raise
    seconds = time.perf_counter() - start
    print(
        f"{_count(frames, unit)} with {_count(objects, 'object')} in {seconds:.1f} s "
        f"({frames / seconds:.1f} {unit}s/s); written to {arguments.output}"
        + (f"; {skipped} skipped" if skipped else "")
    )
    return int(skipped > 0)


def _log(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the progress bar


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _check_output(arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Refuses to replace an input, or an existing file without --overwrite."""
    folder = arguments.output
    names = []
    if arguments.pictures:
        names += [str(drawing_path(source, folder).relative_to(folder)) for source in sources]
    names += [RESULTS, IMAGES] if arguments.json else []
    names += [TABLE] if arguments.csv else []
    inputs = {Path(source.path).resolve() for source in sources if source.kind != "camera"}
    inputs |= {Path(f).resolve() for f in (arguments.like, arguments.weights) if f is not None}
    for path in (folder / name for name in names):
        if path.resolve() in inputs:
            raise UserError(f"{path} is an input and would be replaced; name another --output")
    prepare_output(folder, names, overwrite=arguments.overwrite)
    cutouts = folder / CUTOUTS
    if arguments.cutouts and cutouts.exists() and not arguments.overwrite:
        raise UserError(f"{cutouts} exists; name another --output, or give --overwrite")


def _config(arguments: argparse.Namespace) -> CfgNode:
    device = resolve_device(arguments.device, "--device")
    if arguments.optimize == "fp16" and device == "cpu":
        raise UserError("--optimize fp16 is slower than fp32 on a CPU: use bf16, or --device cuda")
    opts = [text for pair in arguments.set for text in pair]
    cfg = read_config(
        arguments.weights,
        arguments.config_file,
        [*opts, "MODEL.DEVICE", device],
        trusted=arguments.trust_checkpoint,
    )
    # The model may drop low scores early: they never suppress a higher one.
    for group in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        group.SCORE_THRESH_TEST = arguments.score_threshold
    if arguments.classes:
        cfg.TEST.DETECTIONS_PER_IMAGE = -1  # other classes must not use up the limit
    elif arguments.max_detections and not arguments.slice:
        cfg.TEST.DETECTIONS_PER_IMAGE = arguments.max_detections
    return cfg


def _class_ids(given: Sequence[str] | None, class_names: Sequence[str]) -> list[int] | None:
    """The class ids of --classes; None keeps all classes."""
    if not given:
        return None
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--classes names no class")
    if not class_names:
        raise UserError("--classes: these weights do not contain the names of their classes")
    for name in names:
        if name not in class_names:
            hint = did_you_mean(name, class_names) or f"; there are {', '.join(class_names)}"
            raise UserError(f"--classes: the model has no class '{name}'{hint}")
    return [class_names.index(name) for name in names]


def _predict(
    predict: Callable[[list[Any]], list[Instances]], batch: list[Frame]
) -> list[Instances]:
    try:
        return predict([frame.image for frame in batch])
    except torch.OutOfMemoryError as error:
        sizes = {f"{frame.image.shape[1]} x {frame.image.shape[0]}" for frame in batch}
        raise UserError(
            f"out of GPU memory on {len(batch)} images of {', '.join(sorted(sizes)[:3])} pixels: "
            "lower --batch-size, or use --slice or --device cpu"
        ) from error


def _select(instances: Instances, class_ids: list[int] | None, limit: int | None) -> Instances:
    if class_ids is not None:
        instances = instances[torch.isin(instances.pred_classes, torch.tensor(class_ids))]
    best = torch.sort(instances.scores, descending=True, stable=True).indices
    return instances[best[:limit]]


def _outputs(
    arguments: argparse.Namespace,
    cfg: CfgNode,
    predictor: BatchPredictor,
    sources: Sequence[Source],
) -> list[Output]:
    folder, names = arguments.output, predictor.class_names
    outputs: list[Output] = []
    if arguments.json:
        all_names = names or [class_label(names, i) for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
        if arguments.like is None:
            ids, image_ids = category_ids(cfg, all_names), None
        else:
            ids, image_ids = read_ids(arguments.like, all_names, sources)
        outputs.append(CocoResults(folder, all_names, ids, image_ids))
    if arguments.csv:
        outputs.append(ObjectTable(folder, names))
    if arguments.cutouts:
        outputs.append(Cutouts(folder, names))
    if arguments.pictures:
        show = {part: getattr(arguments, part) for part in ("masks", "boxes", "labels", "scores")}
        outputs.append(Drawings(folder, names, show, _log))
    return outputs
