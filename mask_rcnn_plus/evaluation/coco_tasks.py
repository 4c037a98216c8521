"""Which kinds of prediction a ground truth can judge."""

from collections.abc import Sequence

from detectron2.structures import Instances
from pycocotools.coco import COCO

from mask_rcnn_plus.errors import UserError

# Of each task: what an object of the ground truth must have, and what a prediction has.
TASKS = {"bbox": "box", "keypoints": "labelled keypoint", "segm": "mask", "boundary": "mask"}
FIELDS = {"bbox": "pred_boxes", "keypoints": "pred_keypoints", "segm": "pred_masks"}


def can_judge(ground_truth: COCO, task: str, num_keypoints: int) -> bool:
    """Whether the ground truth can; one without any object can judge all, as nan.

    Args:
        ground_truth: after :func:`mask_rcnn_plus.evaluation.coco_scores.complete_ground_truth`.
        task: of TASKS.
        num_keypoints: that an object has.
    """
    anns = ground_truth.anns.values()
    if task == "boundary":
        # The compiled evaluator, the only one that knows boundaries, holds ids as doubles.
        ids = [*ground_truth.getImgIds(), *ground_truth.getCatIds()]
        if not all(isinstance(i, int) and 0 <= i <= 2**53 for i in ids):
            return False
    if task in ("segm", "boundary"):
        return not anns or any(ann.get("segmentation") for ann in anns)
    return task == "bbox" or not anns or num_keypoints > 0


def check_keypoints(
    instances: Instances, labelled: int, kpt_oks_sigmas: Sequence[float], dataset_name: str
) -> None:
    """Refuses keypoints that cannot be compared with the ground truth's.

    Args:
        instances: with "pred_keypoints".
        labelled: how many keypoints an object of the ground truth has.
        kpt_oks_sigmas: TEST.KEYPOINT_OKS_SIGMAS.
        dataset_name: for the message.

    Raises:
        UserError: they are more or fewer, or the sigmas are.
    """
    predicted = instances.pred_keypoints.shape[1]
    if predicted != labelled:
        raise UserError(
            f"the model predicts {predicted} keypoints, {dataset_name} has "
            f"{labelled}: set MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS to {labelled}"
        )
    if (len(kpt_oks_sigmas) or 17) != labelled:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(kpt_oks_sigmas)} values (none means "
            f"COCO's 17), {dataset_name} has {labelled} keypoints: give {labelled}"
        )


def check_masks(ground_truth: COCO, dataset_name: str) -> None:
    """Refuses a ground truth of which some objects have a mask and others have none.

    Raises:
        UserError: it is one.
    """
    bare = [a["id"] for a in ground_truth.anns.values() if not a.get("segmentation")]
    if bare:
        raise UserError(
            f"annotations of {dataset_name} with no segmentation: {len(bare)} (the "
            f"first has id {bare[0]}); mask AP needs one for every object"
        )
