"""Checkpoints with class names and config, and one-line errors for those that do not fit."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.console import LOG_ONLY
from mask_rcnn_plus.engine.fitting import fitting_config, match_classes, stored_classes
from mask_rcnn_plus.engine.weights import (
    cannot_load,
    listed,
    local_weights,
    non_finite,
    read_weights_file,
)
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer with safe files, clear errors and what prediction needs later.

    Args:
        model: the model to save and load.
        save_dir: folder for checkpoints; "" for a checkpointer that only loads.
        strict: refuse weights that leave any parameter unset, as an evaluation does. Training may
            start from partial weights (an ImageNet backbone, another number of classes); it only
            refuses weights that fit no parameter.
        class_names: stored with every checkpoint as ``"class_names"``, in the order of class ids. A
            run does not resume with other names.
        keypoint_names: the same for ``"keypoint_names"``.
        config: YAML text of the config, stored as ``"config"``.
        keep: the number of periodic checkpoints to keep when another is saved; 0 for all.
        checkpointables: as in detectron2.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        class_names: list[str] | None = None,
        keypoint_names: list[str] | None = None,
        config: str = "",
        keep: int = 0,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._strict = strict
        self._extra = {
            "class_names": list(class_names or []),
            "keypoint_names": list(keypoint_names or []),
            "config": config,
        }
        self._keep = keep
        self._resuming = False
        # The checkpoint whose digest is already verified.
        self._verified = ""
        self.trusted = ""
        """The only path that ``load`` may read as a full pickle."""
        self.resumed = False
        """Whether the run continues from one of its own checkpoints."""
        self.last_saved = -1
        """The iteration of the checkpoint that ``--resume`` would use."""

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Saves the model and the checkpointables, completely or not at all (see ``saving``).

        Args:
            name: the file's name without ``.pth``.
            tag: make it the checkpoint that ``--resume`` uses.
            kwargs: further entries of the file.

        Raises:
            FloatingPointError: a weight is not finite; nothing is saved.
            SaveError: the file cannot be written; existing files are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        weights = self.model.state_dict()
        if bad := next(non_finite(weights), ""):
            raise FloatingPointError(f"the weights '{bad}' are not finite")
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        self.save_weights(name, weights, **state, **kwargs)
        if tag:
            saving.point_to(path)
            self.last_saved = kwargs.get("iteration", -1)
        saving.prune(path.parent, self._keep)

    def save_weights(self, name: str, weights: dict[str, Any], **kwargs: Any) -> None:
        """Saves given weights without the state of a run; arguments and errors as in ``save``."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info(f"Saving checkpoint to {path}")
        saving.save({"model": weights, **self._extra, **kwargs}, path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Verifies the digest beside the file, if there is one, and loads the weights.

        Raises:
            UserError: the file does not exist, cannot be downloaded, is damaged, is not a
                checkpoint, or does not fit the model.
        """
        self._path = path
        if not path:
            return super().load(path, *args, **kwargs)
        file = local_weights(path)
        if path != self._verified and saving.has_digest(file) and (fault := saving.damage(file)):
            raise UserError(
                f"weights '{path}': the file {fault}; use another file, or remove "
                f"{file.name}.sha256 if you changed the file yourself"
            )
        return super().load(str(file), *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the newest intact checkpoint of the run, or loads the weights at a path.

        Raises:
            UserError: as ``load``, or the run has checkpoints and all are damaged.
        """
        if self.save_dir and self.save_to_disk:
            saving.clean(Path(self.save_dir))
        if not resume:
            if self.has_checkpoint():
                logger.warning(
                    f"{self.save_dir} holds the checkpoint {Path(self.get_checkpoint_file()).name} "
                    "of an earlier run, which will be overwritten; --resume would continue it"
                )
            return super().resume_or_load(path, resume=False)
        checkpoint = self._choose()
        if not checkpoint:
            start = f"the weights {path}" if path else "random weights"
            logger.info(f"--resume: no checkpoint in {self.save_dir}; starting from {start}")
            return super().resume_or_load(path, resume=False)
        # A run only continues with all weights of its own model.
        self._strict = self._resuming = True
        self._verified = checkpoint
        extra = self.load(checkpoint)
        self.resumed = True
        iteration = extra.get("iteration", -1)
        if type(iteration) is not int or iteration < -1:
            raise UserError(f"'{checkpoint}' is not a resumable checkpoint: invalid 'iteration'")
        logger.info(f"Resuming from {checkpoint} after {iteration + 1} iterations")
        return extra

    def _choose(self) -> str:
        """The newest intact checkpoint of the run, chosen by the main process; "" for none."""
        chosen: Path | None = None
        faults: list[str] = []
        if comm.is_main_process():
            chosen, faults = saving.choose(Path(self.save_dir))
            for fault in faults:
                logger.warning(f"--resume: {fault}; falling back to the one before")
        chosen, faults = comm.all_gather((chosen, faults))[0]
        if faults and not chosen:
            raise saving.none_sound(Path(self.save_dir), faults)
        return str(chosen or "")

    def get_checkpoint_file(self) -> str:
        """The checkpoint of this folder that ``last_checkpoint`` names, or ""."""
        return str(saving.last_saved(Path(self.save_dir)) or "")

    def _load_file(self, filename: str) -> dict[str, Any]:
        # detectron2's own reads a .pkl with an unpickler that runs what the file says.
        trusted = bool(self.trusted) and self._path == self.trusted
        return read_weights_file(Path(filename), name=self._path, trusted=trusted)

    def _load_model(self, checkpoint: Any) -> Any:
        if self._resuming:
            for key, kind in (("class_names", "classes"), ("keypoint_names", "keypoints")):
                _require_same(kind, checkpoint.get(key), self._extra[key])
        own = self.model.state_dict()
        names = list(filter(_matters, own))
        total = len(names)
        if not self._strict:
            by_name = match_classes(
                checkpoint["model"],
                own,
                stored_names=stored_classes(checkpoint),
                names=self._extra["class_names"],
            )
            if by_name:
                logger.info(f"weights '{self._path}': {by_name}")
        fits = fitting_config(checkpoint, own, weights=self._path, trains=not self._strict)
        belongs = fits or "; they belong to another config"
        in_file = list(checkpoint["model"])
        try:
            incompatible = super()._load_model(checkpoint)
        except (ValueError, KeyError, IndexError, AssertionError, RuntimeError) as error:
            raise cannot_load(self._path, error) from error
        shapes = {
            key: f"{key} ({_shape(stored)} in the file, {_shape(own)} in the model)"
            for key, stored, own in incompatible.incorrect_shapes
        }
        # Keys of another shape are also reported as missing.
        missing = [k for k in incompatible.missing_keys if _matters(k) and k not in shapes]
        if len(missing) + len(shapes) >= total:
            raise UserError(
                f"weights '{self._path}' do not fit this model: no parameter fits{belongs}"
            )
        counts = []
        for title, keys in (("missing", missing), ("of another shape", list(shapes.values()))):
            if self._strict and keys:
                # The log lists all keys, the error only the first.
                text = "\n  ".join([f"{title.capitalize()} in {self._path}:", *keys])
                logger.info(text, extra=LOG_ONLY)
                counts.append(f"{len(keys)} of {total} parameters are {title}: {listed(keys, 3)}")
        if counts:
            raise UserError(
                f"weights '{self._path}' do not fit this model: {'; '.join(counts)}{belongs}"
            )
        unused = [key for key in incompatible.unexpected_keys if _matters(key)]
        if self._strict:
            if unused:
                logger.warning(
                    f"weights '{self._path}' have {len(unused)} parameters that this model does "
                    f"not have: {listed(unused, 3)}{fits}"
                )
            return incompatible
        if checkpoint.get("matching_heuristics"):
            unused = []  # the classifier of ImageNet weights
        absent = [*missing, *shapes]
        parts = [f"{total - len(absent)} of {total} parameters loaded"]
        if absent:
            parts.append(f"the rest starts random: {_grouped(absent, names)}")
        if unused:
            parts.append(f"not used: {_grouped(unused, in_file)}")
        if parts[1:]:
            # Heads for other classes are expected; other parts may be a mistake.
            expected = all(re.search("predictor|score_lowres", key) for key in absent + unused)
            logger.info(
                f"weights '{self._path}': {'; '.join(parts)} (names: see log.txt)"
                f"{'' if expected else fits}"
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if not self._strict:  # every name, for log.txt
            super()._log_incompatible_keys(incompatible)


def _require_same(kind: str, stored: Any, names: list[str]) -> None:
    """Refuses to continue with names that mean something else at the same index."""
    if not (isinstance(stored, list) and stored and names) or stored == names:
        return
    pairs = enumerate(zip_longest(stored, names))
    index, (old, new) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    old, new = ("missing" if name is None else f"'{name}'" for name in (old, new))
    raise UserError(
        f"--resume: the {kind} of DATASETS.TRAIN have changed: number {index} was {old} and is "
        f"{new} ({len(stored)} before, {len(names)} now); restore them, or start a new run from "
        "its weights with MODEL.WEIGHTS and without --resume"
    )


def _grouped(absent: Collection[str], names: Collection[str]) -> str:
    """Parameters counted by module: by two levels of names if these are few, else by one."""
    for depth in (2, 1):
        groups, all_groups = (
            Counter(".".join(name.split(".")[:-1][:depth]) for name in each)
            for each in (absent, names)
        )
        if len(groups) < 6:
            break
    return listed([f"{group} ({n} of {all_groups[group]})" for group, n in groups.items()], 6)


def check_run_state(state: Any, *, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuses a stored trainer state that this run cannot continue.

    Args:
        state: the checkpoint's ``Trainer.state_dict()``.
        optimizer: the optimizer of this run.
        name: SOLVER.OPTIMIZER, for the message.

    Raises:
        UserError: the state has another optimizer, was trained with other parameters frozen, has
            optimizer state that is not finite, or is malformed.
    """
    try:
        data = state.get("data", {})
        counts = (state.get("iteration", 0) + 1, data.get("images", 0), data.get("seed", 0))
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("invalid iteration, images or seed")
        if stored := state.get("_trainer", {}).get("optimizer"):
            _check_optimizer(stored, optimizer, name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"not a resumable checkpoint: {type(error).__name__}: {error}") from error


def _check_optimizer(
    stored: Mapping[str, Any], optimizer: torch.optim.Optimizer, name: str
) -> None:
    restart = "or start a new run from its weights with MODEL.WEIGHTS and without --resume"
    both = (stored["param_groups"], optimizer.param_groups)
    # SGD has a momentum, AdamW has betas.
    kinds = [{"momentum", "betas"} & set().union(*groups) for groups in both]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"SOLVER.OPTIMIZER is '{name}', but the checkpoint to resume from was trained with "
            f"another one: keep that, {restart}"
        )
    sizes = [[len(group["params"]) for group in groups] for groups in both]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [
        (index, name, value)
        for index, values in stored["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    ]
    if sizes[0] != sizes[1] or any(
        value.dim() and value.shape != parameters[index].shape for index, _, value in tensors
    ):
        raise UserError(
            "the checkpoint to resume from was trained with other parameters frozen (MODEL.FREEZE, "
            f"FREEZE_AT): keep them, {restart}"
        )
    for index, name, value in tensors:
        if next(non_finite({name: value}), ""):
            raise ValueError(f"the optimizer's {name} of parameter {index} is not finite")


def _matters(key: str) -> bool:
    # BatchNorm only uses its count of batches if its momentum is None.
    return not key.endswith("num_batches_tracked")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
