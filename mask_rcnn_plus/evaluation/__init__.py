"""Evaluators, the timed inference that runs them, and previews of the predictions."""

from mask_rcnn_plus.evaluation.coco import COCOEvaluator, build_coco_evaluator
from mask_rcnn_plus.evaluation.inference import run_inference
from mask_rcnn_plus.evaluation.journal import Journal
from mask_rcnn_plus.evaluation.preview import PreviewSample, PreviewWriter, draw_preview
from mask_rcnn_plus.evaluation.speed import InferenceSpeed

__all__ = [
    "COCOEvaluator",
    "InferenceSpeed",
    "Journal",
    "PreviewSample",
    "PreviewWriter",
    "build_coco_evaluator",
    "draw_preview",
    "run_inference",
]
