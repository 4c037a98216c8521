"""Checkpoints that carry their class names and config, and that say why they do not fit."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.fetching import fetched
from mask_rcnn_plus.engine.weights_file import (
    no_checkpoint,
    read_beside_weights,
    read_weights_file,
)
from mask_rcnn_plus.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# How many parameter names an error message spells out.
_NAMES_IN_MESSAGE = 3


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer with refusals in words and with what prediction needs later.

    Args:
        model: the model whose weights are saved and loaded.
        save_dir: folder for checkpoints; "" for a checkpointer that only loads.
        strict: refuse weights that leave any parameter unset. For evaluation; training starts from
            partial weights (an ImageNet backbone, another number of classes) and refuses only
            weights of which nothing fits.
        class_names: stored with every checkpoint as ``"class_names"``, in the order of class ids.
        config: YAML text of the config, stored as ``"config"``.
        keep: how many periodic checkpoints to leave when another is saved; 0 for all.
        checkpointables: as detectron2's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        class_names: list[str] | None = None,
        config: str = "",
        keep: int = 0,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._strict = strict
        # The path, as load() gets it, of the one file that may be read as a full pickle.
        self.trusted = ""
        self._extra = {"class_names": list(class_names or []), "config": config}
        self._keep = keep
        self._sound = ""
        self.resumed = False
        """Whether the run goes on from a checkpoint of its own."""
        self.last_saved = -1
        """The iteration stored with the checkpoint that ``--resume`` would take."""

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Saves as detectron2's does, but whole or not at all (see ``saving``).

        Args:
            name: of the file, without ``.pth``.
            tag: make it the one that ``--resume`` takes.
            kwargs: stored with it.

        Raises:
            FloatingPointError: a weight is not finite; nothing is saved.
            SaveError: it cannot be written; what was there is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        weights = self.model.state_dict()
        if bad := saving.first_not_finite(weights):
            raise FloatingPointError(f"the weights '{bad}' are not finite")
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info(f"Saving checkpoint to {path}")
        saving.save({"model": weights, **state, **self._extra, **kwargs}, path)
        if tag:
            saving.point_to(path)
            self.last_saved = kwargs.get("iteration", -1)
        saving.prune(path.parent, self._keep)

    def save_weights(self, name: str, weights: dict[str, Any], **kwargs: Any) -> None:
        """Saves other weights than the model's, with nothing that a run could go on from.

        Args:
            name: of the file, without ``.pth``.
            weights: under the names of the model's.
            kwargs: stored with them.

        Raises:
            SaveError: it cannot be written; what was there is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info(f"Saving weights to {path}")
        saving.save({"model": weights, **self._extra, **kwargs}, path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As detectron2's, after a look at the digest where there is one beside the file.

        Raises:
            UserError: the file does not exist, cannot be fetched, is damaged, is no checkpoint, or
                does not fit the model.
        """
        self._path = path
        if not path:
            return super().load(path, *args, **kwargs)
        file = local_weights(path)
        if path != self._sound and saving.has_digest(file) and (fault := saving.damage(file)):
            raise UserError(
                f"weights '{path}': the file {fault}; take another, or remove {file.name}.sha256 "
                "if you changed the file yourself"
            )
        return super().load(str(file), *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As detectron2's, and says which it did; what is damaged is passed over.

        Raises:
            UserError: as ``load``, or there are checkpoints to resume from and all are damaged.
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
        # What continues a run has to be that run's model, whole.
        self._strict = True
        self._sound = checkpoint
        extra = self.load(checkpoint)
        self.resumed = True
        iteration = extra.get("iteration", -1)
        if type(iteration) is not int or iteration < -1:
            raise UserError(f"checkpoint '{checkpoint}' has no number of iterations to go on from")
        logger.info(f"Resuming from {checkpoint}, which has {iteration + 1} iterations behind it")
        return extra

    def _choose(self) -> str:
        """The newest sound checkpoint of the run, by the judgement of the main process; or ""."""
        chosen, faults = None, []
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
        # Not detectron2's, which reads a .pkl with an unpickler that runs what the file says.
        trusted = bool(self.trusted) and self._path == self.trusted
        return read_weights_file(Path(filename), named=self._path, trusted=trusted)

    def _load_model(self, checkpoint: Any) -> Any:
        wanted = [key for key in self.model.state_dict() if _matters(key)]
        try:
            incompatible = super()._load_model(checkpoint)
        except (ValueError, KeyError, IndexError, AssertionError, RuntimeError) as error:
            raise no_checkpoint(self._path, error) from error
        missing = [key for key in incompatible.missing_keys if _matters(key)]
        shapes = [
            f"{key} ({_shape(there)} in the file, {_shape(here)} in the model)"
            for key, there, here in incompatible.incorrect_shapes
        ]
        # load_state_dict was not given the keys of another shape, so they are among the missing.
        misshapen = {key for key, _, _ in incompatible.incorrect_shapes}
        missing = [key for key in missing if key not in misshapen]
        if len(missing) + len(shapes) >= len(wanted):
            raise UserError(f"weights '{self._path}' do not fit this model: not one parameter fits")
        if self._strict and (missing or shapes):
            for title, keys in (("Missing", missing), ("Of another shape", shapes)):
                if keys:
                    names = "\n  ".join(keys)
                    # A run's log has all of them, the refusal the first.
                    logger.info(f"{title} in {self._path}:\n  {names}", extra={"log_only": True})
            parts = [
                f"{len(keys)} of {len(wanted)} parameters are {title}: {_some(keys)}"
                for title, keys in (("missing", missing), ("of another shape", shapes))
                if keys
            ]
            raise UserError(
                f"weights '{self._path}' do not fit this model: {'; '.join(parts)}; they belong to "
                "another config"
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if not self._strict:  # of a training that starts from other weights, each name counts
            super()._log_incompatible_keys(incompatible)
        elif unused := list(incompatible.unexpected_keys):
            logger.warning(
                f"weights '{self._path}' have {len(unused)} parameters that this model has no "
                f"place for: {_some(unused)}"
            )


def local_weights(path: str) -> Path:
    """The local file of some weights; what is remote is fetched into iopath's cache.

    Args:
        path: a file, a URL or a ``detectron2://`` name.

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    if "://" in path:
        return fetched(path)
    file = Path(path)
    if not file.is_file():
        if file.is_dir():
            raise UserError(f"weights '{path}' are a folder: name a .pth or .pkl file")
        siblings = file.parent.iterdir() if file.parent.is_dir() else ()
        checkpoints = [str(p) for p in siblings if p.suffix in (".pth", ".pkl")]
        raise UserError(f"weights '{path}' do not exist{did_you_mean(path, checkpoints)}")
    return file


def read_class_names(path: str, *, trusted: bool = False) -> list[str]:
    """The class names stored with a checkpoint of this project, in the order of class ids.

    Args:
        path: as for :func:`local_weights`.
        trusted: read the file as a full pickle, and run what it says.

    Returns:
        the names; an empty list for checkpoints of others (model zoo, ``.pkl``), which have none.

    Raises:
        UserError: there is no such file, or it is no checkpoint.
    """
    file = local_weights(path)
    if file.suffix != ".pth":
        return []
    names = read_beside_weights(file, named=path, trusted=trusted).get("class_names")
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return list(names) if named else []


def _matters(key: str) -> bool:
    # BatchNorm's count of batches is read only where its momentum is None.
    return not key.endswith("num_batches_tracked")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMES_IN_MESSAGE
    return ", ".join(keys[:_NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")
