"""detectron2's DefaultTrainer, with this project's evaluation, checkpoints and console."""

import json
import logging
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, print_csv_format
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from detectron2.utils import comm

from mask_rcnn_plus.data import NamingMapper, PolygonMapper
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.console import ProgressBar
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation import PreviewWriter, build_coco_evaluator, run_inference

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains, evaluates and saves by a config.

    Args:
        cfg: a frozen config from :func:`mask_rcnn_plus.engine.setup`.
    """

    def build_hooks(self) -> list[HookBase | None]:
        # DefaultTrainer has just made a checkpointer, and the hooks are about to hold on to it.
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            class_names=MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("thing_classes"),
            config=self.cfg.dump(),
            trainer=weakref.proxy(self),
        )
        hooks = super().build_hooks()
        if comm.is_main_process():
            hooks.insert(-1, ProgressBar())
        return hooks

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # detectron2 0.6 forgets the optimiser here, and with it the momentum.
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = state_dict.get("_trainer", {}).get("optimizer")
        if stored and _kind(stored["param_groups"]) != _kind(self.optimizer.param_groups):
            raise UserError(
                f"SOLVER.OPTIMIZER is '{self.cfg.SOLVER.OPTIMIZER}', and the checkpoint to resume "
                "from was trained with the other one: keep it, or start anew from its weights with "
                "MODEL.WEIGHTS and without --resume"
            )
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # absent in a checkpoint of detectron2 0.6's own trainer
            self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """detectron2's SGD, or AdamW with the same rules for norm layers, biases and clipping."""
        solver = cfg.SOLVER
        if solver.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, solver.BASE_LR)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """detectron2's loader; an image or annotation that cannot be used is named."""
        mapper = DatasetMapper(cfg, is_train=True)
        if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
            mapper = PolygonMapper(mapper)
        return build_detection_train_loader(cfg, mapper=NamingMapper(mapper))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The COCO evaluator, and what draws the preview where TEST.PREVIEW_IMAGES asks for one."""
        evaluators: list[DatasetEvaluator] = [
            build_coco_evaluator(
                dataset_name,
                output_dir=str(_inference_dir(cfg, dataset_name)),
                detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
            )
        ]
        if cfg.TEST.PREVIEW_IMAGES > 0:
            evaluators.append(
                PreviewWriter(
                    dataset_name,
                    output_dir=cfg.OUTPUT_DIR,
                    num_images=cfg.TEST.PREVIEW_IMAGES,
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

        Both are also written to ``OUTPUT_DIR/inference/<data set>/metrics.json``.

        Args:
            cfg: the config.
            model: a model that holds the weights to evaluate.
            evaluators: one for each data set; by default what ``build_evaluator`` gives.

        Returns:
            of the main process: task -> metric -> value for a single data set, else the same below
            each data set's name. Of others: empty dicts.
        """
        names = cfg.DATASETS.TEST
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in names]
        elif isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        results: OrderedDict[str, Any] = OrderedDict()
        for name, evaluator in zip(names, evaluators, strict=True):
            loader = cls.build_test_loader(cfg, name)
            results[name], speed = run_inference(model, loader, evaluator, dataset_name=name)
            if comm.is_main_process():
                logger.info(f"Evaluation results for {name} in csv format:")
                print_csv_format(results[name])
                logger.info(f"Speed on {name}:\n{speed.table()}")
                report = _inference_dir(cfg, name) / "metrics.json"
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(json.dumps({**results[name], "speed": speed.to_dict()}, indent=1))
        return results[names[0]] if len(names) == 1 else results


def _kind(param_groups: list[dict[str, Any]]) -> set[str]:
    """What tells SGD's state from AdamW's."""
    return {"momentum", "betas"} & set().union(*param_groups)


def _inference_dir(cfg: CfgNode, dataset_name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "inference" / dataset_name
