"""COCO's average precision for boxes, masks and keypoints; each nan is explained in the log."""

import io
import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Instances
from detectron2.utils import comm
from pycocotools.cocoeval import COCOeval

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import instances_to_coco_json
from mask_rcnn_plus.evaluation.journal import Journal
from mask_rcnn_plus.evaluation.metrics import (
    accumulate,
    coco_table,
    complete_ground_truth,
    explain_nan,
    metrics_table,
    summary_rows,
    write_summary,
)
from mask_rcnn_plus.files import replacing

_logger = logging.getLogger(__name__)

# Each task, with what an object of the ground truth needs for it.
TASKS = {"bbox": "box", "keypoints": "labelled keypoint", "segm": "mask", "boundary": "mask"}
_FIELDS = {"bbox": "pred_boxes", "keypoints": "pred_keypoints", "segm": "pred_masks"}


class COCOEvaluator(Detectron2COCOEvaluator):
    """detectron2's evaluator, with these differences.

    ``max_dets_per_image`` can raise COCO's limit of 100 detections per image and never lowers it.
    ``evaluate`` does not change the predictions, so it may be called again. If the model finds
    nothing, AP is 0, not nan, for classes that have objects. The log explains each nan.
    ``summary.csv`` has all metrics of all classes. Boundary AP is available.

    Attributes:
        journal: saves each image's result until the evaluation ends, for resuming; or None.
    """

    journal: Journal | None = None

    def __init__(
        self,
        dataset_name: str,
        tasks: Any = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        boundary: bool = False,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set, in COCO format or convertible to it.
            tasks: which of "bbox", "segm", "keypoints" to score; None scores what the model
                predicts and the ground truth has labels for.
            distributed: gather the predictions of all processes on the main one; False lets each
                process score its own predictions.
            output_dir: where ``coco_instances_results.json`` (masks as run lengths),
                ``instances_predictions.pth`` and ``summary.csv`` are written; None writes no file.
            max_dets_per_image: how many detections of an image count, best scores first, if
                above COCO's 100; negative means all. Keypoints keep COCO's 20.
            boundary: also score the boundaries of the masks, as "boundary".
            use_fast_impl: score with detectron2's compiled evaluator; False uses pycocotools.
            kpt_oks_sigmas: the tolerance of each keypoint in COCO's object keypoint similarity,
                above 0; empty uses COCO's 17.
            **kwargs: further arguments of detectron2's evaluator.
        """
        super().__init__(
            dataset_name,
            tasks,
            distributed,
            output_dir,
            use_fast_impl=use_fast_impl,
            kpt_oks_sigmas=kpt_oks_sigmas,
            **kwargs,
        )
        self._dataset_name = dataset_name
        self._max_dets = max_dets_per_image or 0
        self._boundary = boundary
        self._num_keypoints = complete_ground_truth(self._coco_api)
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions except those that the journal recovered."""
        recovered = self.journal.kept if self.journal else []
        keys = ("image_id", "instances")
        self._predictions: list[dict[str, Any]] = [{k: e[k] for k in keys} for e in recovered]
        # Instances without objects still show which heads the model has; their json does not.
        self._predicted: set[str] = {task for entry in recovered for task in entry["tasks"]}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Adds the predictions for a batch; does not change them.

        Args:
            inputs: one mapping per image, with "image_id".
            outputs: one mapping per image, with "instances" (R objects; boxes (R, 4) in pixels of
                the original H x W image, masks PastedMasks or bool (R, H, W)) or "proposals".

        Raises:
            UserError: the ground truth does not match the predictions, for example in the number
                of keypoints.
        """
        for image, output in zip(inputs, outputs, strict=True):
            prediction = {"image_id": image["image_id"]}
            if "instances" in output:
                instances = output["instances"].to(self._cpu_device)
                self._note_tasks(instances)
                prediction["instances"] = instances_to_coco_json(instances, image["image_id"])
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
                self._predictions.append(prediction)
            if self.journal and set(prediction) == {"image_id", "instances"}:
                self.journal.add({**prediction, "tasks": sorted(self._predicted)})

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, dict[str, float]]:
        """Scores the predictions since ``reset`` and logs the tables; every process must call it.

        Args:
            img_ids: the images to score; None scores all of the data set, predicted or not.

        Returns:
            on the main process ``{"bbox": {"AP": ..., "AP50": ..., "AP-<class>": ...}, ...}``:
            from 0 to 100, nan where the ground truth lacks such an object. Empty on the other
            processes, and if the data set has no annotations.

        Raises:
            UserError: the data set lacks a prediction's class or image.
        """
        predictions, predicted = self._predictions, self._predicted
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((predictions, predicted), dst=0)
            if not comm.is_main_process():
                return {}
            predictions = [prediction for part, _ in gathered for prediction in part]
            predicted = set().union(*(tasks for _, tasks in gathered))
        # The same order for any number of processes and after any number of resumptions.
        position = {image: index for index, image in enumerate(self._coco_api.imgs)}
        predictions = sorted(predictions, key=lambda p: position.get(p["image_id"], len(position)))
        if self._output_dir:
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)
            path = Path(self._output_dir) / "instances_predictions.pth"
            content = io.BytesIO()  # torch's C++ code does not survive an error in a file's write
            torch.save(predictions, content)
            with replacing(path, "wb") as file:
                file.write(content.getbuffer())

        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if proposals := [p for p in predictions if "proposals" in p]:
            self._eval_box_proposals(proposals)
        if predicted or not proposals:
            self._score([p.get("instances", []) for p in predictions], predicted, img_ids)
        return {task: dict(metrics) for task, metrics in self._results.items()}

    def _note_tasks(self, instances: Instances) -> None:
        """Checks each kind of prediction when it is first seen, before hours of inference."""
        tasks = {task for task, field in _FIELDS.items() if instances.has(field)}
        new = tasks - self._predicted if self._do_evaluation else set()
        self._predicted |= tasks
        if "keypoints" in new and self._num_keypoints:
            self._check_keypoints(instances.pred_keypoints.shape[1])
        if "segm" in new and self._can_score("segm"):
            bare = [a["id"] for a in self._coco_api.anns.values() if not a.get("segmentation")]
            if bare:
                raise UserError(
                    f"annotations of {self._dataset_name} with no segmentation: {len(bare)} (the "
                    f"first has id {bare[0]}); mask AP needs one for every object"
                )

    def _check_keypoints(self, predicted: int) -> None:
        name, labelled = self._dataset_name, self._num_keypoints
        if predicted != labelled:
            raise UserError(
                f"the model predicts {predicted} keypoints, {name} has {labelled}: "
                f"set MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS to {labelled}"
            )
        sigmas = len(self._kpt_oks_sigmas)
        if (sigmas or 17) != labelled:
            raise UserError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values (an empty list means COCO's 17), "
                f"{name} has {labelled} keypoints: give {labelled} values"
            )

    def _can_score(self, task: str) -> bool:
        """Whether the ground truth has labels for a task; without any object, all AP are nan."""
        anns = self._coco_api.anns.values()
        if task in ("segm", "boundary"):
            return not anns or any(ann.get("segmentation") for ann in anns)
        return task == "bbox" or not anns or self._num_keypoints > 0

    def _score(
        self,
        per_image: Sequence[Sequence[dict[str, Any]]],
        predicted: set[str],
        img_ids: Sequence[Any] | None,
    ) -> None:
        """Fills ``self._results`` from detections in COCO's format; does not change them."""
        detections = self._with_dataset_ids(itertools.chain(*per_image))
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            _logger.info("Saving the predictions to %s", path)
            with replacing(path) as file:
                json.dump(detections, file)
        if not self._do_evaluation:
            _logger.info("%s has no annotations, so there is no AP", self._dataset_name)
            return
        if unknown := {d["image_id"] for d in detections} - set(self._coco_api.imgs):
            raise UserError(
                f"image id {min(unknown, key=str)} has predictions, but it is not in the ground "
                f"truth of {self._dataset_name}, {self._metadata.json_file}: evaluate on its images"
            )
        if not detections:
            _logger.warning(
                "The model found nothing in %s, so AP is 0 for each class that has objects. Train "
                "longer, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST.",
                self._dataset_name,
            )
        limit = self._max_dets if self._max_dets >= 0 else max(map(len, per_image), default=0)
        tasks = sorted(self._tasks or predicted or filter(self._can_score, _FIELDS))
        if self._boundary and "segm" in tasks and self._can_score("boundary"):
            # Only the compiled evaluator supports boundaries, and it stores ids as doubles.
            ids = [*self._coco_api.getImgIds(), *self._coco_api.getCatIds()]
            if odd := [i for i in ids if not isinstance(i, int) or not 0 <= i <= 2**53]:
                _logger.warning(
                    "No boundary AP: %d of the %d ids of images and categories of %s are not whole "
                    "numbers from 0 to 2 ** 53, the first is %r. Renumber them to get it.",
                    *(len(odd), len(ids), self._dataset_name, odd[0]),
                )
            else:
                tasks.append("boundary")
        summary = []
        for task in tasks:
            if not self._can_score(task):
                _logger.warning(
                    "No %s AP: no object of %s has a %s.", task, self._dataset_name, TASKS[task]
                )
                continue
            compiled = self._use_fast_impl or task == "boundary"
            coco_eval = accumulate(
                self._coco_api,
                detections,
                task,
                max_dets=(1, 10, max(100, limit)),
                kpt_oks_sigmas=self._kpt_oks_sigmas,
                img_ids=img_ids,
                engine=coco_evaluation.COCOeval_opt if compiled else COCOeval,
            )
            rows = summary_rows(coco_eval, task, self._class_names(coco_eval), detections)
            self._results[task] = self._report(coco_eval, task, rows)
            summary += rows
        if self._output_dir:
            write_summary(summary, Path(self._output_dir) / "summary.csv")

    def _with_dataset_ids(self, detections: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Copies of the detections, with the data set's category ids instead of class indices."""
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if not to_contiguous:
            return [dict(detection) for detection in detections]
        to_dataset = {v: k for k, v in to_contiguous.items()}
        detections = list(detections)
        if unknown := {d["category_id"] for d in detections} - set(to_dataset):
            raise UserError(
                f"the model predicted class {min(unknown)}, {self._dataset_name} has "
                f"{len(to_dataset)} classes: were the weights trained on other classes?"
            )
        return [{**d, "category_id": to_dataset[d["category_id"]]} for d in detections]

    def _class_names(self, coco_eval: Any) -> Sequence[str]:
        categories = self._coco_api.loadCats(coco_eval.params.catIds)
        names = self._metadata.get("thing_classes") or []
        return names if len(names) == len(categories) else [c["name"] for c in categories]

    def _report(
        self, coco_eval: Any, task: str, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Logs the tables of a task and returns its metrics."""
        metrics = {k: v for k, v in rows[0].items() if k.startswith("AP")}
        # With a single class, its AP is the overall AP.
        per_class = {f"AP-{row['class']}": row["AP"] for row in rows[1:]} if len(rows) > 2 else {}
        # COCO's twelve lines go to log.txt; the screen shows the tables below.
        summary = (task, self._dataset_name, coco_table(coco_eval))
        _logger.info("COCO summary for %s on %s:\n%s", *summary, extra={"log_only": True})
        tables = (task, self._dataset_name, metrics_table(metrics, per_class))
        _logger.info("Evaluation results for %s on %s:\n%s", *tables)
        if reasons := explain_nan(metrics, per_class, TASKS[task]):
            _logger.warning("%s: %s", task, reasons.replace("\n", "; "))
        return {**metrics, **per_class}


def build_coco_evaluator(
    dataset_name: str,
    *,
    output_dir: str | None,
    detections_per_image: int,
    kpt_oks_sigmas: Sequence[float] = (),
    boundary: bool = False,
) -> COCOEvaluator:
    """Builds a :class:`COCOEvaluator` from the values of a config's TEST.

    Args:
        detections_per_image: TEST.DETECTIONS_PER_IMAGE, as ``max_dets_per_image``.
    """
    return COCOEvaluator(
        dataset_name,
        output_dir=output_dir,
        max_dets_per_image=detections_per_image,
        kpt_oks_sigmas=kpt_oks_sigmas,
        boundary=boundary,
    )
