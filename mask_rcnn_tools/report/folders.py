"""Where a run has the files of an evaluation. Imports only the standard library."""

from difflib import get_close_matches
from pathlib import Path

from mask_rcnn_tools.arguments import UsageError


def results_folder(folder: Path, data_set: str | None) -> Path:
    """The folder with the detections of an evaluation.

    Args:
        folder: the OUTPUT_DIR of a run.
        data_set: one of its test sets; None if it has only one.

    Raises:
        UsageError: the run has no such evaluation, or several.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no run '{folder}'")
    inference = folder / "inference"
    names = sorted(path.parent.name for path in inference.glob("*/coco_instances_results.json"))
    if data_set is not None and names and data_set not in names:
        close = get_close_matches(data_set, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known test sets: {', '.join(names)}"
        raise UsageError(f"'{folder}' was not evaluated on '{data_set}'; {hint}")
    if len(names) > 1 and data_set is None:
        raise UsageError(f"'{folder}' was evaluated on {', '.join(names)}: choose one with --data")
    if names:
        return inference / (data_set or names[0])
    if (inference / "coco_instances_results.json").is_file():  # as detectron2's tools write it
        return inference
    raise UsageError(
        f"'{folder}' has no inference/*/coco_instances_results.json: name the OUTPUT_DIR of a run "
        "that train_net.py has evaluated"
    )
