"""detectron2's DefaultTrainer, with this project's evaluation, checkpoints and console."""

import logging
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from mask_rcnn_plus.data import Batches
from mask_rcnn_plus.data.build import build_test_batches, build_train_batches, build_train_mapper
from mask_rcnn_plus.data.formats import read_image
from mask_rcnn_plus.engine import freezing, saving
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.console import quiet_threads
from mask_rcnn_plus.engine.divergence import DivergedError, Step, report
from mask_rcnn_plus.engine.evaluating import for_evaluation
from mask_rcnn_plus.engine.hooks import extended
from mask_rcnn_plus.engine.optimizer import build_optimizer
from mask_rcnn_plus.engine.run_state import check_run_state
from mask_rcnn_plus.engine.steps import Steps, amp_dtype
from mask_rcnn_plus.engine.stops import DIVERGED, Leave, Stops
from mask_rcnn_plus.engine.testing import evaluate_all, inference_folder
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation import PreviewWriter, build_coco_evaluator

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains, evaluates and saves by a config; a run that is interrupted can go on exactly.

    Args:
        cfg: a frozen config from :func:`mask_rcnn_plus.engine.setup`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._stops = Stops()
        with warnings.catch_warnings():
            # detectron2 makes a scaler for CUDA first, whatever the device.
            warnings.filterwarnings("ignore", message=".*GradScaler")
            super().__init__(cfg)
        of = self._trainer
        self._trainer = Steps(
            *(of.model, of.data_loader, of.optimizer),
            amp=amp_dtype(cfg),
            parts=cfg.SOLVER.ACCUMULATE_STEPS,
            exact=cfg.SOLVER.ACCUMULATE_EXACT,
        )
        freezing.hold(self.model, cfg.MODEL.FREEZE)
        # How many iterations the weights have behind them, and how many with all their hooks.
        self._steps_done = self._whole_steps = 0
        self._batches.gate = self._gate

    @property
    def _batches(self) -> Batches:
        return self._trainer.data_loader

    @property
    def finished(self) -> bool:
        """Whether the last iteration is done, with all that follows it."""
        return self._whole_steps >= self.max_iter

    def build_hooks(self) -> list[HookBase | None]:
        cfg = self.cfg
        # DefaultTrainer has just made a checkpointer, and the hooks are about to hold on to it.
        self.checkpointer = Checkpointer(
            self.model,
            cfg.OUTPUT_DIR,
            class_names=MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes"),
            config=cfg.dump(),
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            trainer=weakref.proxy(self),
        )
        return extended(
            super().build_hooks(), cfg, checkpointer=self.checkpointer, stops=self._stops
        )

    def resume_or_load(self, resume: bool = True) -> None:
        """Goes on from the newest sound checkpoint of the run, or loads MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1

    def train(self) -> Any:
        """As detectron2's; when it has to end early, it saves what it has.

        Raises:
            UserError: the run cannot go on; its exit code says why.
            Leave: a signal, or another process, ended it.
        """
        self._steps_done = self._whole_steps = self.start_iter
        with self._stops.listening(), quiet_threads():
            try:
                self._save_final_if_due()
                results = super().train()
            except (Leave, UserError) as stop:
                self._save_before(stop)
                raise
            except OSError as error:  # by detectron2's writers of figures
                if error.errno not in saving.NO_WRITING:
                    raise
                raise saving.explained(Path(self.cfg.OUTPUT_DIR) / "metrics.json", error) from error
        self._batches.report_bad()
        return results

    def _save_final_if_due(self) -> None:
        """Saves what a run did not live to save that was killed after its last periodic save."""
        last = Path(self.checkpointer.get_checkpoint_file()).name
        if self.checkpointer.resumed and self.finished and last != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self._steps_done - 1)

    def before_step(self) -> None:
        # A run that ends early lowers max_iter; detectron2's loop still counts to what it was.
        if not self.finished:
            super().before_step()

    def run_step(self) -> None:
        if self.finished:
            return
        try:
            super().run_step()
        except FloatingPointError as error:
            # The sum of all processes' losses, at the end of the step; else in the midst of one's.
            together = str(error).startswith("Loss became")
            raise self._diverged(str(error), together=together) from error
        self._steps_done = self.iter + 1

    def after_step(self) -> None:
        if self.finished:
            return
        try:
            super().after_step()
        except FloatingPointError as error:  # by the checkpointer
            raise self._diverged(str(error), together=True) from error
        self._whole_steps = self._steps_done

    def after_train(self) -> None:
        reason = sys.exc_info()[1]
        if self.finished:
            self.iter = self.max_iter
        try:
            super().after_train()
        except OSError:
            # Where nothing can be written, neither can the last figures; what ends the run counts.
            if not isinstance(reason, UserError | Leave | OSError):
                raise

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # detectron2 0.6 forgets the optimiser here, and with it the momentum.
        state.setdefault("_trainer", self._trainer.state_dict())
        # After a step that was not done, or after the last, detectron2's count is one too many.
        state["iteration"] = self._steps_done - 1
        state["data"] = self._batches.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_run_state(state_dict, optimizer=self.optimizer, asked=self.cfg.SOLVER.OPTIMIZER)
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # absent in a checkpoint of detectron2 0.6's own trainer
            self._trainer.load_state_dict(state_dict["_trainer"])
        # Absent in a checkpoint of detectron2's.
        data = state_dict.get("data", {})
        seed = data.get("seed") if self.cfg.SEED < 0 else None
        self._batches.start(step=self.iter + 1, images=data.get("images"), seed=seed)
        self._batches.bad = dict(data.get("bad", {}))
        if data.get("seed", self._batches.seed) != self._batches.seed:
            logger.warning(
                f"SEED is {self._batches.seed}, and the run began with {data['seed']}: it goes on "
                "with other images and draws"
            )

    def _gate(self, fault: UserError | None) -> None:
        """Between two steps: ends this process if it, or any other, has to."""
        code = self._stops.agree(fault.exit_code if fault else self._stops.code)
        if code == DIVERGED:
            comm.gather(self._step())
        if fault:
            raise fault
        if code:
            raise Leave(code)

    def _step(self) -> Step:
        return Step(self._batches.latest, self._batches.step_words, amp_dtype(self.cfg))

    def _diverged(self, what: str, *, together: bool) -> DivergedError:
        """Finds out and says what is known, with the help of processes that are at the gate."""
        steps = [self._step()]
        if together and comm.get_world_size() > 1:
            self._stops.agree(DIVERGED)
            steps = comm.gather(steps[0])
        return report(
            getattr(self.model, "module", self.model),
            steps,
            what=what,
            iteration=self.iter,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            base_lr=self.cfg.SOLVER.BASE_LR,
            config=self.cfg.dump(),
            path=Path(self.cfg.OUTPUT_DIR) / f"divergence{comm.get_rank() or ''}.pt",
        )

    def _save_before(self, stop: Leave | UserError) -> None:
        """Saves the last whole step, unless it is saved or what ends the run forbids it."""
        if isinstance(stop, saving.SaveError) and comm.get_world_size() > 1:
            self._stops.agree(stop.exit_code)
        code = stop.code if isinstance(stop, Leave) else stop.exit_code
        if code in (DIVERGED, saving.SaveError.exit_code) or not comm.is_main_process():
            return
        last = self._steps_done - 1
        if last >= self.start_iter and last != self.checkpointer.last_saved:
            try:
                self.checkpointer.save(f"model_{last:07d}", iteration=last)
            except FloatingPointError as error:
                raise self._diverged(str(error), together=False) from error
        if isinstance(stop, Leave):
            saved = Path(self.checkpointer.get_checkpoint_file()).name or "nothing saved yet"
            sys.stderr.write(f"stopped after {last + 1} iterations ({saved}); see --resume\n")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """detectron2's, without gradients for what MODEL.FREEZE names."""
        model = super().build_model(cfg)
        freezing.freeze(model, cfg.MODEL.FREEZE)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Batches:
        """The batches of the config, from its SEED."""
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        return build_train_batches(cfg, build_train_mapper(cfg), seed=seed)

    build_test_loader = staticmethod(build_test_batches)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The COCO evaluator, and what draws the preview where TEST.PREVIEW_IMAGES asks for one."""
        evaluators: list[DatasetEvaluator] = [
            build_coco_evaluator(
                dataset_name,
                output_dir=str(inference_folder(cfg, dataset_name)),
                detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
                boundary=cfg.TEST.BOUNDARY_AP,
            )
        ]
        if (images := cfg.TEST.PREVIEW_IMAGES) > 0:
            evaluators.append(
                PreviewWriter(
                    dataset_name,
                    output_dir=cfg.OUTPUT_DIR,
                    num_images=images,
                    read_image=read_image,
                )
            )
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluates on every data set of DATASETS.TEST and logs the figures and the speed.

        Both are also written into ``OUTPUT_DIR/inference/<data set>``; see ``testing.py``.

        Args:
            cfg: the config.
            model: a model that holds the weights to evaluate; with TEST.OPTIMIZE a copy is.
            evaluators: one for each data set; by default what ``build_evaluator`` gives.

        Returns:
            of the main process: task -> metric -> value for a single data set, else the same below
            each data set's name. Of others: empty dicts.
        """
        model = for_evaluation(cfg, model)
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        elif isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        return evaluate_all(cfg, model, evaluators, cls.build_test_loader)
