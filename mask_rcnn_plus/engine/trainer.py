"""detectron2's DefaultTrainer with this project's evaluation, checkpoints and console."""

import logging
import sys
import time
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from mask_rcnn_plus.config import complete
from mask_rcnn_plus.data import Batches
from mask_rcnn_plus.data.batches import LoaderError
from mask_rcnn_plus.data.build import build_test_batches, build_train_batches, build_train_mapper
from mask_rcnn_plus.data.pixels import read_image
from mask_rcnn_plus.engine import freezing, lock, saving
from mask_rcnn_plus.engine.checkpoint import Checkpointer, check_run_state
from mask_rcnn_plus.engine.checks import describe_data, log_changes
from mask_rcnn_plus.engine.console import in_one_line, quiet_threads
from mask_rcnn_plus.engine.divergence import DivergedError, Step, report
from mask_rcnn_plus.engine.hooks import extend_hooks
from mask_rcnn_plus.engine.optimizer import build_optimizer
from mask_rcnn_plus.engine.steps import Steps, amp_dtype
from mask_rcnn_plus.engine.stops import DIVERGED, Interrupt, StopSignals
from mask_rcnn_plus.engine.testing import evaluate_all, evaluation_model, inference_folder
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation import PreviewWriter, build_coco_evaluator

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains, evaluates and saves by a config; an interrupted run can resume exactly.

    Args:
        cfg: a frozen config from :func:`mask_rcnn_plus.engine.setup`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = complete(cfg)
        self._signals = StopSignals()
        with warnings.catch_warnings():
            # detectron2 first creates a gradient scaler for CUDA, whatever the device.
            warnings.filterwarnings("ignore", message=".*GradScaler")
            super().__init__(cfg)
        stock = self._trainer
        self._trainer = Steps(
            stock.model,
            stock.data_loader,
            stock.optimizer,
            amp=amp_dtype(cfg),
            parts=cfg.SOLVER.ACCUMULATE_STEPS,
        )
        self._data_sets = describe_data(cfg) if comm.is_main_process() else {}
        self._data_sets["training images"] = stock.data_loader.size
        freezing.freeze_mode(self.model, cfg.MODEL.FREEZE)
        self._batches: Batches = stock.data_loader
        # Number of iterations that updated the weights, and of those whose hooks have all run.
        self._steps_done = self._whole_steps = 0

    @property
    def finished(self) -> bool:
        """Whether the last iteration and its hooks are done."""
        return self._whole_steps >= self.max_iter

    def build_hooks(self) -> list[HookBase | None]:
        cfg = self.cfg
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        # Before super().build_hooks(), whose hooks refer to it.
        self.checkpointer = Checkpointer(
            self.model,
            cfg.OUTPUT_DIR,
            class_names=metadata.get("thing_classes"),
            keypoint_names=metadata.get("keypoint_names") if cfg.MODEL.KEYPOINT_ON else None,
            config=cfg.dump(),
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            trainer=weakref.proxy(self),
        )
        return extend_hooks(
            super().build_hooks(), cfg, checkpointer=self.checkpointer, signals=self._signals
        )

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes from the newest intact checkpoint of the run, or loads MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1

    def train(self) -> Any:
        """Trains like detectron2's trainer; a run that ends early saves its last step.

        Raises:
            UserError: the run cannot continue; the exit code says why.
            Interrupt: a signal or another process ended the run.
        """
        self._steps_done = self._whole_steps = self.start_iter
        if comm.is_main_process():
            lock.acquire(self.cfg.OUTPUT_DIR)
        with self._signals.recorded(), quiet_threads():
            try:
                self._save_final_if_missing()
                results = super().train()
            except (Interrupt, UserError) as end:
                self._save_last_step(end)
                raise
            except OSError as error:  # from detectron2's writers of metrics
                if error.errno not in saving.NO_WRITING:
                    raise
                raise saving.failure(Path(self.cfg.OUTPUT_DIR) / "metrics.json", error) from error
            finally:
                lock.release()
        self._batches.report_bad()
        return results

    def _save_final_if_missing(self) -> None:
        """Saves the final checkpoint of a run that was killed after its last periodic one."""
        last = Path(self.checkpointer.get_checkpoint_file()).name
        if self.checkpointer.resumed and self.finished and last != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self._steps_done - 1)

    def before_step(self) -> None:
        # Early stopping lowers max_iter, but detectron2's loop continues.
        if not self.finished:
            super().before_step()

    def run_step(self) -> None:
        if self.finished:
            return
        start = time.perf_counter()
        batch, problem = [], None
        try:
            batch = self._batches.fetch()
        except UserError as error:
            problem = error
        data_time = time.perf_counter() - start
        self._end_together(problem)
        self._batches.begin_step(batch)
        self._trainer.iter = self.iter
        # Settings that do not fit together may only fail here.
        first = self.iter == self.start_iter
        try:
            with in_one_line("the first step fails") if first else nullcontext():
                self._trainer.train_on(batch, data_time)
        except FloatingPointError as error:
            # Either the losses of all processes, after the step, or a value of this process, in the
            # middle of it.
            together = str(error).startswith("Loss became")
            raise self._diverged(str(error), together=together) from error
        self._steps_done = self.iter + 1

    def _end_together(self, problem: UserError | None) -> None:
        """Before each step: ends all processes if one has a problem or received a signal."""
        if isinstance(problem, LoaderError) and self._signals.exit_code:
            problem = None  # the signal has ended the workers, too
        code = self._signals.agree(problem.exit_code if problem else self._signals.exit_code)
        if code == DIVERGED:
            comm.gather(self._last_step())
        if problem:
            raise problem
        if code:
            raise Interrupt(code)

    def after_step(self) -> None:
        if self.finished:
            return
        try:
            super().after_step()
        except FloatingPointError as error:  # from the checkpointer
            raise self._diverged(str(error), together=True) from error
        self._whole_steps = self._steps_done

    def after_train(self) -> None:
        reason = sys.exc_info()[1]
        if self.finished:
            self.iter = self.max_iter
        try:
            super().after_train()
        except OSError:
            # On a full disk writing the last metrics also fails; report the first error.
            if not isinstance(reason, UserError | Interrupt | OSError):
                raise

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # detectron2 0.6 leaves out the optimizer, and with it the momentum.
        state.setdefault("_trainer", self._trainer.state_dict())
        # detectron2's number is one too high after an interrupted step, and after the last one.
        state["iteration"] = self._steps_done - 1
        state["data"] = self._batches.state_dict()
        state["data_sets"] = dict(self._data_sets)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_run_state(state_dict, optimizer=self.optimizer, name=self.cfg.SOLVER.OPTIMIZER)
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # missing in checkpoints of detectron2 0.6
            self._trainer.load_state_dict(state_dict["_trainer"])
        # Missing in checkpoints of detectron2.
        data = state_dict.get("data", {})
        seed = data.get("seed") if self.cfg.SEED < 0 else None
        self._batches.start(step=self.iter + 1, images=data.get("images"), seed=seed)
        self._batches.bad = dict(data.get("bad", {}))
        if comm.is_main_process():
            log_changes(state_dict.get("data_sets"), self._data_sets)
        if data.get("seed", self._batches.seed) != self._batches.seed:
            logger.warning(
                f"SEED is {self._batches.seed}, but the run began with {data['seed']}: the images "
                "and random draws will differ"
            )

    def _last_step(self) -> Step:
        return Step(self._batches.current, self._batches.step_seed, amp_dtype(self.cfg))

    def _diverged(self, what: str, *, together: bool) -> DivergedError:
        """Reports that ``what`` is not finite, together with processes that finished the step."""
        steps = [self._last_step()]
        if together and comm.get_world_size() > 1:
            self._signals.agree(DIVERGED)
            steps = comm.gather(steps[0])
        return report(
            getattr(self.model, "module", self.model),
            steps,
            self.cfg,
            what=what,
            iteration=self.iter,
            learning_rate=self.optimizer.param_groups[0]["lr"],
        )

    def _save_last_step(self, end: Interrupt | UserError) -> None:
        """Saves the last finished step, unless it is saved already or cannot be saved."""
        if isinstance(end, saving.SaveError) and comm.get_world_size() > 1:
            self._signals.agree(end.exit_code)
        code = end.code if isinstance(end, Interrupt) else end.exit_code
        if code in (DIVERGED, saving.SaveError.exit_code) or not comm.is_main_process():
            return
        last = self._steps_done - 1
        if last >= self.start_iter and last != self.checkpointer.last_saved:
            try:
                self.checkpointer.save(f"model_{last:07d}", iteration=last)
            except FloatingPointError as error:
                raise self._diverged(str(error), together=False) from error
        if isinstance(end, Interrupt):
            saved = Path(self.checkpointer.get_checkpoint_file()).name or "nothing saved yet"
            sys.stderr.write(f"stopped after {last + 1} iterations ({saved}); see --resume\n")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Builds detectron2's model, and freezes the parameters of MODEL.FREEZE."""
        model = super().build_model(cfg)
        freezing.freeze(model, complete(cfg).MODEL.FREEZE)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Batches:
        """Builds the training batches of the config, in the order of its SEED."""
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        return build_train_batches(cfg, build_train_mapper(cfg), seed=seed)

    build_test_loader = staticmethod(build_test_batches)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Builds the COCO evaluator, and the preview writer if TEST.PREVIEW_IMAGES is above 0."""
        cfg = complete(cfg)
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
                    read_image=partial(read_image, sixteen_bit=cfg.INPUT.SIXTEEN_BIT),
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
        """Evaluates on every data set of DATASETS.TEST and logs the metrics and the speed.

        Also writes both into ``OUTPUT_DIR/inference/<data set>``; see ``testing.py``.

        Args:
            cfg: the config.
            model: the model to evaluate; with TEST.OPTIMIZE an optimized copy is evaluated.
            evaluators: one per data set; by default those of ``build_evaluator``.

        Returns:
            in the main process: task -> metric -> value for a single data set, otherwise data set
            -> task -> metric -> value. In other processes: empty dicts.
        """
        cfg = complete(cfg)
        model = evaluation_model(cfg, model)
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        elif isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        return evaluate_all(cfg, model, evaluators, cls.build_test_loader)
