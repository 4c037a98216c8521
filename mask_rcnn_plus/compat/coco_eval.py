"""Replaces detectron2's ``evaluation/fast_eval_api.py``: COCO evaluation in C++.

faster-coco-eval 1.8.0 was measured against pycocotools 2.0.11 over 150 random data sets (box, mask
and keypoints; crowds, ignored and empty objects, tied scores, up to 160 detections an image, images
and categories without objects, subsets of images, other ``maxDets``, one ground truth evaluated
several times): recall and score arrays are identical, the precision array and every statistic agree
to 2.2e-16. tests/compat/test_coco_eval.py repeats a part of this comparison.
"""

from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class CppCOCOeval(COCOeval_faster):
    """faster-coco-eval for pycocotools' COCO objects, with pycocotools' parameters and output."""

    def __init__(self, cocoGt: COCO, cocoDt: COCO, iouType: str = "segm") -> None:
        # With these objects, the base class would read attributes that only its own COCO class has,
        # and drop categories without keypoints, which detectron2's table of classes needs.
        super().__init__(None, None, iouType, print_function=print)
        self.cocoGt, self.cocoDt = cocoGt, cocoDt
        self.params.imgIds = sorted(cocoGt.getImgIds())
        self.params.catIds = sorted(cocoGt.getCatIds())


def COCOeval_opt(cocoGt: COCO, cocoDt: COCO, iouType: str = "segm") -> CppCOCOeval | COCOeval:
    """The evaluator that ``COCOEvaluator(use_fast_impl=True)`` runs.

    Args:
        cocoGt: the ground truth.
        cocoDt: the detections, from ``cocoGt.loadRes``.
        iouType: "bbox", "segm" or "keypoints".

    Returns:
        the C++ evaluator, or pycocotools' if the C++ one would fail (ids that are not natural
        numbers) or treat a missing area as 0, which pycocotools refuses.
    """
    ids = [*cocoGt.getImgIds(), *cocoGt.getCatIds()]
    # The C++ code stores an id as a double, which holds every integer up to 2 ** 53.
    natural = all(isinstance(i, int) and 0 <= i <= 2**53 for i in ids)
    measured = all("area" in annotation for annotation in cocoGt.anns.values())
    return (CppCOCOeval if natural and measured else COCOeval)(cocoGt, cocoDt, iouType)
