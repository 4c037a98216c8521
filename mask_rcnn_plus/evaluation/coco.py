"""COCO's average precision for boxes, masks and keypoints, with each missing figure explained."""

import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import instances_to_coco_json, with_dataset_ids
from mask_rcnn_plus.evaluation.coco_scores import (
    accumulate,
    class_figures,
    coco_figures,
    coco_table,
    complete_ground_truth,
    explain_nan,
    figures_table,
)
from mask_rcnn_plus.evaluation.coco_tasks import (
    FIELDS,
    TASKS,
    can_judge,
    check_keypoints,
    check_masks,
)
from mask_rcnn_plus.evaluation.journal import Journal
from mask_rcnn_plus.evaluation.summary import summary_rows, write_summary

_logger = logging.getLogger(__name__)

# COCO's limits on the detections of an image: for AR@1, for AR@10, for everything else.
_MAX_DETS = (1, 10, 100)
_NOTHING = (
    "The model found nothing in %s, so AP is 0 wherever there are objects. It may need longer "
    "training, or a lower MODEL.ROI_HEADS.SCORE_THRESH_TEST."
)


class COCOEvaluator(Detectron2COCOEvaluator):
    """detectron2's evaluator, with figures that can be trusted and read.

    Where it differs: ``max_dets_per_image`` can raise COCO's limit of 100 detections an image and
    never lowers it; ``evaluate`` leaves the predictions as they were and may be called again; a
    model that finds nothing scores 0, not nan, where there was something to find; each nan is
    explained in the log; ``summary.csv`` has all figures of all classes.

    Attributes:
        journal: where each image's result is kept until the evaluation ends; None keeps none.
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
            tasks: which of "bbox", "segm", "keypoints" to score; None takes what the model
                predicts and the ground truth can judge.
            distributed: gather the predictions of all processes on the main one; False lets each
                process score its own.
            output_dir: where ``coco_instances_results.json`` (masks as run lengths),
                ``instances_predictions.pth`` and ``summary.csv`` are written; None writes none.
            max_dets_per_image: how many detections of an image count, best scores first, where
                that is above COCO's 100; negative means all. Keypoints keep COCO's 20.
            boundary: where masks are scored, score their boundaries as well, as "boundary".
            use_fast_impl: score with detectron2's compiled evaluator; False takes pycocotools.
            kpt_oks_sigmas: the tolerance of each keypoint in COCO's object keypoint similarity,
                above 0; empty takes COCO's 17.
            **kwargs: whatever else the installed detectron2's evaluator takes.
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
        self._limit = max_dets_per_image or 0
        self._boundary = boundary
        self._num_keypoints = complete_ground_truth(self._coco_api)
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions but those that the journal got back."""
        kept = self.journal.kept if self.journal else []
        self._predictions: list[dict[str, Any]] = [
            {"image_id": entry["image_id"], "instances": entry["instances"]} for entry in kept
        ]
        # An Instances without objects still tells which heads the model has; its json does not.
        self._predicted: set[str] = {task for entry in kept for task in entry["tasks"]}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Adds the predictions on a batch, and changes nothing in them.

        Args:
            inputs: one mapping an image, with "image_id".
            outputs: one mapping an image, with "instances" (R objects; boxes (R, 4) in pixels of
                the original H x W image, masks PastedMasks or bool (R, H, W)) or "proposals".

        Raises:
            UserError: the ground truth cannot judge what the model predicts, for example because
                it has another number of keypoints.
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
            img_ids: the images to score; None scores all of the data set, predicted on or not.

        Returns:
            on the main process ``{"bbox": {"AP": ..., "AP50": ..., "AP-<class>": ...}, ...}``:
            from 0 to 100, nan where the ground truth has nothing to find. Empty on the other
            processes, and where the data set has no annotations.

        Raises:
            UserError: a prediction's class or image is none of the data set's.
        """
        predictions, predicted = self._predictions, self._predicted
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((predictions, predicted), dst=0)
            if not comm.is_main_process():
                return {}
            predictions = [prediction for part, _ in gathered for prediction in part]
            predicted = set().union(*(tasks for _, tasks in gathered))
        # One order, however many processes shared the images, and in however many sittings.
        place = {image: index for index, image in enumerate(self._coco_api.imgs)}
        predictions = sorted(predictions, key=lambda p: place.get(p["image_id"], len(place)))
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = Path(self._output_dir) / "instances_predictions.pth"
            with PathManager.open(str(path), "wb") as file:
                torch.save(predictions, file)

        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()
        proposals = [prediction for prediction in predictions if "proposals" in prediction]
        if proposals:
            self._eval_box_proposals(proposals)
        if predicted or not proposals:
            self._score([p.get("instances", []) for p in predictions], predicted, img_ids)
        return {task: dict(figures) for task, figures in self._results.items()}

    def _note_tasks(self, instances: Instances) -> None:
        """Checks each kind of prediction when it is first seen: before the inference, not after."""
        tasks = {task for task, field in FIELDS.items() if instances.has(field)}
        new = {task for task in tasks - self._predicted if self._do_evaluation}
        self._predicted |= tasks
        if "keypoints" in new and self._num_keypoints:
            sigmas = self._kpt_oks_sigmas
            check_keypoints(instances, self._num_keypoints, sigmas, self._dataset_name)
        if "segm" in new and can_judge(self._coco_api, "segm", 0):
            check_masks(self._coco_api, self._dataset_name)

    def _score(
        self,
        per_image: Sequence[Sequence[dict[str, Any]]],
        predicted: set[str],
        img_ids: Sequence[Any] | None,
    ) -> None:
        """Fills ``self._results`` from COCO-style detections, which it does not change."""
        detections = with_dataset_ids(
            itertools.chain(*per_image),
            self._metadata.get("thing_dataset_id_to_contiguous_id"),
            self._dataset_name,
        )
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            _logger.info("Saving the predictions to %s", path)
            with PathManager.open(str(path), "w") as file:
                json.dump(detections, file)
        if not self._do_evaluation:
            _logger.info("%s has no annotations: nothing to score against.", self._dataset_name)
            return
        self._refuse_unknown({d["image_id"] for d in detections} - set(self._coco_api.imgs))
        if not detections:
            _logger.warning(_NOTHING, self._dataset_name)
        limit = self._limit if self._limit >= 0 else max(map(len, per_image), default=0)
        max_dets = [*_MAX_DETS[:2], max(_MAX_DETS[2], limit)]
        judged = [t for t in FIELDS if can_judge(self._coco_api, t, self._num_keypoints)]
        tasks = sorted(self._tasks or predicted or judged)
        if self._boundary and "segm" in tasks and can_judge(self._coco_api, "boundary", 0):
            tasks.append("boundary")
            judged.append("boundary")
        summary, fast = [], self._use_fast_impl
        for task in tasks:
            if task not in judged:
                _logger.warning(
                    "No %s AP: no object of %s has a %s.", task, self._dataset_name, TASKS[task]
                )
                continue
            coco_eval = accumulate(
                self._coco_api,
                detections,
                task,
                max_dets=max_dets,
                kpt_oks_sigmas=self._kpt_oks_sigmas,
                img_ids=img_ids,
                engine=coco_evaluation.COCOeval_opt if fast or task == "boundary" else COCOeval,
            )
            names = self._class_names(coco_eval)
            self._results[task] = self._report(coco_eval, task, names)
            summary += summary_rows(coco_eval, task, names, detections)
        if self._output_dir:
            write_summary(summary, Path(self._output_dir) / "summary.csv")

    def _refuse_unknown(self, images: set[Any]) -> None:
        if images:
            raise UserError(
                f"image id {min(images, key=str)} has predictions and is not in the ground truth "
                f"of {self._dataset_name}, {self._metadata.json_file}: evaluate on its own images"
            )

    def _class_names(self, coco_eval: Any) -> Sequence[str]:
        categories = self._coco_api.loadCats(coco_eval.params.catIds)
        names = self._metadata.get("thing_classes") or []
        if len(names) != len(categories):
            names = [category["name"] for category in categories]
        return names

    def _report(self, coco_eval: Any, task: str, names: Sequence[str]) -> dict[str, float]:
        """Logs the tables of a task and returns its figures."""
        figures = coco_figures(coco_eval)
        # Of a single class the AP is the AP.
        per_class = class_figures(coco_eval, names) if len(names) > 1 else {}
        _logger.info(
            "Evaluation results for %s on %s:\n%s\n\n%s",
            *(task, self._dataset_name, coco_table(coco_eval), figures_table(figures, per_class)),
        )
        reasons = explain_nan(figures, per_class, TASKS[task])
        if reasons:
            _logger.warning("Of the figures for %s,\n%s", task, reasons)
        return {**figures, **per_class}


def build_coco_evaluator(
    dataset_name: str,
    *,
    output_dir: str | None,
    detections_per_image: int,
    kpt_oks_sigmas: Sequence[float] = (),
    boundary: bool = False,
) -> COCOEvaluator:
    """The evaluator of a data set, for the config's values.

    Args:
        dataset_name: a registered data set.
        output_dir: where the predictions are written, or None.
        detections_per_image: TEST.DETECTIONS_PER_IMAGE: above 100 it raises the number of
            detections that count; negative removes the limit.
        kpt_oks_sigmas: TEST.KEYPOINT_OKS_SIGMAS; empty takes COCO's.
        boundary: TEST.BOUNDARY_AP.
    """
    return COCOEvaluator(
        dataset_name,
        output_dir=output_dir,
        max_dets_per_image=detections_per_image,
        kpt_oks_sigmas=kpt_oks_sigmas,
        boundary=boundary,
    )
