"""Reads images, predicts on them, and writes the outputs."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from tqdm import tqdm

from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.errors import UserError, did_you_mean, reason
from mask_rcnn_plus.prediction import BatchPredictor, SlicedPredictor
from mask_rcnn_plus.prediction.building import read_config, resolve_classes
from mask_rcnn_tools.files import writing
from mask_rcnn_tools.predict.frames import (
    Frame,
    count_frames,
    open_camera,
    prefetch_batches,
    read_frames,
)
from mask_rcnn_tools.predict.outputs import (
    CocoResults,
    Cutouts,
    Drawings,
    ObjectTable,
    Output,
    category_ids,
    class_label,
    plain,
    read_ids,
)
from mask_rcnn_tools.predict.sources import Skip, Source

# The model sees less than this part of an image's sides: small objects may vanish.
_SHRUNK = 1 / 4


def run(
    arguments: argparse.Namespace,
    sources: Sequence[Source],
    left_out: Sequence[tuple[str, int]],
) -> int:
    """Predicts and writes: returns 1 if something was left out or could not be read, else 0."""
    limit_pixels(arguments.max_pixels)
    skipped = frames = objects = 0

    def skip(message: str, count: int) -> None:
        nonlocal skipped
        skipped += count
        _log(f"{'skipped' if count else 'note'}: {message}")

    for message, count in left_out:
        skip(message, count)
    cameras = {s.path: open_camera(s.path) for s in sources if s.kind == "camera"}
    cfg, class_names = _config(arguments)
    class_ids = _class_ids(arguments.classes, class_names)
    unit = "image" if all(source.kind == "image" for source in sources) else "frame"
    with writing(arguments.output, "write into --output"), ExitStack() as files:
        outputs = _outputs(arguments, cfg, class_names, sources, files, skip)
        predictor = BatchPredictor(
            cfg,
            batch_size=arguments.batch_size,
            paste=False,
            trust_checkpoint=arguments.trust_checkpoint,
            optimize_to=arguments.optimize,
        )
        predict: Callable[[list[Any]], list[Instances]] = predictor
        if arguments.slice:
            predict = SlicedPredictor(predictor, tile=arguments.slice, overlap=arguments.overlap)
        start = time.perf_counter()
        total = count_frames(sources)
        # disable=None: show the bar only on a terminal.
        bar = files.enter_context(tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True))
        hint = "" if arguments.slice else None
        try:
            frames_read = read_frames(sources, cameras, skip, sixteen_bit=predictor.sixteen_bit)
            for batch in prefetch_batches(frames_read, arguments.batch_size):
                for frame, instances in _predict(predict, batch, skip):
                    if hint is None and (hint := _slice_hint(cfg, frame)):
                        _log(hint)
                    kept = _select(instances.to("cpu"), class_ids, arguments.max_detections)
                    for output in outputs:
                        output.add(frame, kept)
                    frames += 1
                    objects += len(kept)
                    bar.update()
                    del frame, instances  # frees a large image before the next one is read
        except (KeyboardInterrupt, SystemExit) as error:
            files.close()  # completes the files, with what is finished
            if not cameras or isinstance(error, SystemExit):
                raise
    seconds = time.perf_counter() - start
    print(
        f"{_count(frames, unit)} with {_count(objects, 'object')} of score "
        f"{arguments.score_threshold:g} or more in {seconds:.1f} s "
        f"({frames / seconds:.1f} {unit}s/s); written to {arguments.output}"
        + (f"; {skipped} skipped" if skipped else "")
    )
    return int(skipped > 0)


def _log(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the progress bar


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _config(arguments: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """The config and the class names, checked before the weights are read."""
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
        cfg.TEST.DETECTIONS_PER_IMAGE = 2**20  # other classes must not use up the limit
    elif arguments.max_detections and not arguments.slice:
        cfg.TEST.DETECTIONS_PER_IMAGE = arguments.max_detections
    if arguments.cutouts and not cfg.MODEL.MASK_ON:
        raise UserError("--cutouts needs masks, which this model does not predict")
    if arguments.slice and cfg.MODEL.KEYPOINT_ON:
        raise UserError("--slice: keypoints cannot be merged across tiles")
    return resolve_classes(cfg, trusted=arguments.trust_checkpoint)


def _slice_hint(cfg: CfgNode, frame: Frame) -> str | None:
    """A hint at --slice if the model sees a much smaller image than the file has."""
    shorter, longer = sorted(frame.image.shape[:2])
    side = cfg.INPUT.MIN_SIZE_TEST
    shrunk = min(side / shorter, cfg.INPUT.MAX_SIZE_TEST / longer)
    if side < 1 or shrunk > _SHRUNK:
        return None
    return (
        f"hint: {frame.path} is predicted at 1/{round(1 / shrunk)} of its size "
        f"({round(shrunk * longer)} x {round(shrunk * shorter)} pixels). If small objects are "
        f"missed, or the model was trained on smaller images, try --slice {max(side, 32)}"
    )


def _class_ids(given: Sequence[str] | None, class_names: Sequence[str]) -> list[int] | None:
    """The class ids of --classes; None keeps all classes."""
    if not given:
        return None
    if not class_names:
        raise UserError("--classes: these weights do not contain the names of their classes")
    ids = {plain(name): i for i, name in enumerate(class_names)}
    ids |= {name: i for i, name in enumerate(class_names)}
    found = []
    for text in given:
        parts = text.split(",")
        while parts:
            # Names may contain commas: the longest that matches counts.
            for count in range(len(parts), 0, -1):
                if (name := plain(",".join(parts[:count]))) in ids:
                    found.append(ids[name])
                    break
            else:
                if name:
                    hint = (
                        did_you_mean(name, class_names) or f"; there are {', '.join(class_names)}"
                    )
                    raise UserError(f"--classes: the model has no class '{name}'{hint}")
            del parts[:count]
    return found


def _predict(
    predict: Callable[[list[Any]], list[Instances]], batch: list[Frame], skip: Skip
) -> list[tuple[Frame, Instances]]:
    """Frames and their objects. Frames on which the model fails are skipped."""
    try:
        results = predict([frame.image for frame in batch])
    except UserError:
        raise
    except Exception as error:  # a frame of unusual size can fail in any way
        if len(batch) > 1:
            return [pair for frame in batch for pair in _predict(predict, [frame], skip)]
        height, width = batch[0].image.shape[:2]
        why = f"{type(error).__name__}: {reason(error)}"
        if isinstance(error, torch.OutOfMemoryError):
            why = "out of GPU memory; use --slice or --device cpu"
        skip(f"{batch[0].path} ({width} x {height} pixels): {why}", 1)
        return []
    return list(zip(batch, results, strict=True))


def _select(instances: Instances, class_ids: list[int] | None, limit: int | None) -> Instances:
    if class_ids is not None:
        instances = instances[torch.isin(instances.pred_classes, torch.tensor(class_ids))]
    best = torch.sort(instances.scores, descending=True, stable=True).indices
    return instances[best[:limit]]


def _outputs(
    arguments: argparse.Namespace,
    cfg: CfgNode,
    names: Sequence[str],
    sources: Sequence[Source],
    files: ExitStack,
    skip: Skip,
) -> list[Output]:
    folder = arguments.output
    outputs: list[Output] = []
    if arguments.json:
        all_names = names or [class_label(names, i) for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
        if arguments.like is None:
            ids, image_ids = category_ids(cfg, all_names), None
        else:
            ids, image_ids = read_ids(arguments.like, all_names, sources)
        outputs.append(CocoResults(folder, all_names, files, ids, image_ids))
    if arguments.csv:
        outputs.append(ObjectTable(folder, names, files))
    if arguments.cutouts:
        outputs.append(Cutouts(folder, names, files))
    if arguments.pictures:
        show = {part: getattr(arguments, part) for part in ("masks", "boxes", "labels", "scores")}
        outputs.append(Drawings(folder, names, files, show, _log, skip))
    return outputs
