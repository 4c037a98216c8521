"""Each patch of compat: the symptom without it and the fix with it, in a fresh process.

The processes are forked from a server that has imported torch but not detectron2.
"""

import multiprocessing
import pkgutil
import runpy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[2] / "mask_rcnn_plus"
TIMEOUT_S = 120


# Each experiment fails if the patch of the same name is needed and missing.


def layers_without_extension() -> None:
    import torch
    from detectron2.layers import ROIAlign

    pooled = ROIAlign(1, 1.0, 1)(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]))
    assert pooled.item() == 1


def extent_transform_default() -> None:
    import numpy as np
    from detectron2.data.transforms import ExtentTransform

    ramp = np.array([[0, 100]], np.uint8)
    # Half a pixel to the right: halfway between the two values, which shows interpolation.
    assert ExtentTransform((0.5, 0, 1.5, 1), (1, 1)).apply_image(ramp).item() == 50


def removed_numpy_names() -> None:
    import numpy as np
    from detectron2.data import print_instances_class_histogram
    from detectron2.structures.masks import polygons_to_bitmask

    print_instances_class_histogram([{"annotations": [{"category_id": 1}]}], ["cat", "dog"])
    square = np.array([1, 1, 3, 1, 3, 3, 1, 3], float)
    assert polygons_to_bitmask([square], 5, 5).sum() == 4


def retry_after_skipped_image() -> None:
    from detectron2.data import MapDataset

    loaded = MapDataset(range(100), lambda image: None if image < 50 else image)
    assert min(loaded[0] for _ in range(8)) >= 50


def writable_masks() -> None:
    import numpy as np
    from detectron2.data.detection_utils import annotations_to_instances
    from detectron2.structures import BoxMode

    mask = np.eye(4, dtype=np.uint8)
    mask.flags.writeable = False
    annotation = {"category_id": 0, "bbox": [0, 0, 4, 4], "bbox_mode": BoxMode.XYXY_ABS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = annotations_to_instances([annotation | {"segmentation": mask}], (4, 4), "bitmask")
    assert made.gt_masks.tensor.sum() == 4


def meshgrid_indexing() -> None:
    import torch
    from detectron2.modeling import anchor_generator

    generator = anchor_generator.DefaultAnchorGenerator(
        sizes=[[32]], aspect_ratios=[[1.0]], strides=[16]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anchors = generator([torch.zeros(1, 1, 2, 3)])[0]
    # The centres of 16-pixel cells, 2 rows of 3, row by row.
    centers = [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]]
    assert anchors.get_centers().tolist() == centers
    torch.jit.script(anchor_generator._create_grid_offsets)


def fast_coco_evaluator() -> None:
    from detectron2.evaluation import coco_evaluation

    fast = coco_evaluation.COCOeval_opt
    assert fast is not coco_evaluation.COCOeval, "slow, without detectron2._C"


def coco_json_encoding() -> None:
    from pycocotools.coco import COCO

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write('{"images": [], "annotations": [], "categories": []}'.encode("utf-16"))
        file.flush()
        assert COCO(file.name).dataset["images"] == []


def masks_to_arrays() -> None:
    import torch
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from detectron2.structures import Boxes, Instances

    found = Instances((4, 4), pred_boxes=Boxes(torch.tensor([[0.0, 0, 4, 4]])))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    found.pred_masks = torch.eye(4, dtype=torch.bool)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (written,) = instances_to_coco_json(found, 1)
    assert import_module("pycocotools.mask").area(written["segmentation"]) == 4


def stock_scheduler_state() -> None:
    import torch
    from detectron2.engine.hooks import LRScheduler

    def hook() -> LRScheduler:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return LRScheduler(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 10))

    before, after = hook(), hook()
    for _ in range(3):
        before._optimizer.step()
        before.scheduler.step()
    after.load_state_dict(before.state_dict())
    assert after.scheduler.last_epoch == 3, "the scheduler's state is lost"


def distributed_on_cpu() -> None:
    import torch
    from detectron2 import engine
    from detectron2.utils import comm

    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    comm.get_world_size, comm.get_local_rank = lambda: 2, lambda: 0
    for create in (engine.create_ddp_model, engine.defaults.create_ddp_model):
        wrapped = create(torch.nn.Linear(2, 1), broadcast_buffers=False)
        assert wrapped(torch.ones(1, 2)).shape == (1, 1)
        assert not wrapped.broadcast_buffers


def distributed_buffers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        distributed_on_cpu()


def mixed_precision_names() -> None:
    import torch
    from detectron2.engine import AMPTrainer

    model = torch.nn.Linear(1, 1)
    with warnings.catch_warnings(record=True) as seen:
        AMPTrainer(model, [], torch.optim.SGD(model.parameters(), lr=1.0))
    said = [str(w.message) for w in seen if w.category is FutureWarning]
    assert not said, said


def model_zoo_without_pkg_resources() -> None:
    from detectron2 import model_zoo

    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    assert model_zoo.get_checkpoint_url(name).endswith("model_final_a54504.pkl")
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        model_zoo.get_config_file("no_such.yaml")


def model_zoo_configs() -> None:
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    for name, heads in (
        ("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml", {}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", {"MASK_ON": True}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x.yaml", {"MASK_ON": True}),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", {"KEYPOINT_ON": True}),
        ("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml", {"MASK_ON": True}),
        ("Base-RCNN-FPN.yaml", {}),
    ):
        cfg = get_cfg()
        cfg.merge_from_file(model_zoo.get_config_file(name))
        assert {key: cfg.MODEL[key] for key in heads} == heads, name
    trained = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", trained=True)
    assert trained.MODEL.WEIGHTS.endswith("model_final_b275ba.pkl")
    for name in ("no_such.yaml", "COCO-Detection/mask_rcnn_R_50_C4_1x.yaml"):
        with pytest.raises(RuntimeError, match=r"not available in Model Zoo.*clients\.md"):
            model_zoo.get_config_file(name)


def export_without_caffe2() -> None:
    from detectron2.config import get_cfg
    from detectron2.export import Caffe2Tracer, TracingAdapter, add_export_config
    from detectron2.utils.analysis import FlopCountAnalysis

    assert TracingAdapter and FlopCountAnalysis
    cfg = add_export_config(get_cfg())
    assert not cfg.EXPORT_CAFFE2.USE_HEATMAP_MAX_KEYPOINT
    assert "caffe2" not in sys.modules
    shared = import_module("detectron2.export.shared")
    with pytest.raises(ImportError, match="Caffe2"):
        shared.workspace.ResetWorkspace()
    with pytest.raises(ImportError):
        Caffe2Tracer.export_onnx(None)


# How each experiment fails without its patch.
SYMPTOMS = {
    layers_without_extension: "cannot import name '_C'",
    extent_transform_default: "has no attribute 'LINEAR'",
    removed_numpy_names: "has no attribute 'int'",
    retry_after_skipped_image: "Population must be a sequence",
    writable_masks: "not writable",
    meshgrid_indexing: "pass the indexing argument",
    fast_coco_evaluator: "_C",
    coco_json_encoding: "can't decode",
    masks_to_arrays: "copy keyword",
    stock_scheduler_state: "the scheduler's state is lost",
    distributed_on_cpu: "device_ids",
    distributed_buffers: "`broadcast_buffers` is deprecated",
    mixed_precision_names: "torch.cuda.amp",
    model_zoo_without_pkg_resources: "No module named 'pkg_resources'",
    model_zoo_configs: "not available in Model Zoo",
    export_without_caffe2: "No module named 'caffe2'",
}


def _compat(without: str | None = None) -> ModuleType:
    """The patches in this fresh process, not yet applied, without one of them."""
    package = ModuleType(
        "mask_rcnn_plus"
    )  # instead of the real package, whose __init__ applies all
    package.__path__ = [str(PACKAGE)]
    sys.modules[package.__name__] = package
    compat = import_module("mask_rcnn_plus.compat.patches")
    compat.PATCHES = tuple(patch for patch in compat.PATCHES if patch.__name__ != without)
    return compat


def _symptom(name: str, without: str | None) -> str:
    """The experiment's error, or nothing."""
    try:
        _compat(without).apply()
        globals()[name]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _patches() -> tuple[list[str], list[str]]:
    compat = _compat()
    return [patch.__name__ for patch in compat.PATCHES], compat.apply()


@pytest.fixture(scope="module")
def fresh() -> Iterator[Pool]:
    """Two processes at a time, one task each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "pycocotools.coco", "cv2"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def patches(fresh: Pool) -> tuple[list[str], list[str]]:
    return fresh.apply(_patches)


@pytest.fixture(scope="module")
def symptoms(fresh: Pool) -> dict[tuple[str, bool], AsyncResult]:
    """Every experiment with and without its patch, all started at once."""
    return {
        (e.__name__, patched): fresh.apply_async(
            _symptom, (e.__name__, None if patched else e.__name__), {}
        )
        for e in SYMPTOMS
        for patched in (True, False)
    }


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SYMPTOMS, ids=lambda e: e.__name__)
def test_the_patch_removes_the_symptom(experiment, symptoms, patches) -> None:
    name = experiment.__name__
    assert symptoms[name, True].get(TIMEOUT_S) == ""
    if name not in patches[1]:
        pytest.skip("the installed detectron2 needs no such patch")
    assert SYMPTOMS[experiment] in symptoms[name, False].get(TIMEOUT_S)


def test_each_patch_has_an_experiment(patches) -> None:
    assert patches[0] == [experiment.__name__ for experiment in SYMPTOMS]


def _apply_twice() -> None:
    compat = import_module("mask_rcnn_plus.compat.patches")
    engine = import_module("detectron2.engine")
    coco = import_module("detectron2.evaluation.coco_evaluation")

    first, state = compat.apply(), (engine.create_ddp_model, coco.np, list(warnings.filters))
    assert compat.apply() == first
    assert (engine.create_ddp_model, coco.np, list(warnings.filters)) == state


def test_applying_again_changes_nothing(fresh) -> None:
    fresh.apply(_apply_twice)


def _import_beside_others() -> list[str]:
    """The warnings of ``import mask_rcnn_plus``. Checks that other packages do not change."""
    names = ("torch", "torch.optim.lr_scheduler", "torch.cuda.amp", "numpy", "PIL.Image", "random")
    others = [import_module(name) for name in names]
    before = [dict(vars(other)) for other in others]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        import_module("mask_rcnn_plus")
    for other, old in zip(others, before, strict=True):
        new = dict(vars(other))
        assert all(new.get(name) is old[name] for name in old), other
        # Only submodules that another import loaded for the first time.
        assert all(isinstance(new[name], ModuleType) for name in new.keys() - old.keys()), other
    for name in ("pkg_resources", "detectron2._C", "caffe2", "caffe2.proto"):  # a stub has no spec
        assert name not in sys.modules or sys.modules[name].__spec__, name
    return [f"{w.filename}: {w.message}" for w in seen]


def test_import_changes_no_other_package_and_is_silent(fresh) -> None:
    assert fresh.apply(_import_beside_others) == []


def _unimportable() -> dict[str, str]:
    """Which modules of detectron2 cannot be imported, and the package that each one lacks."""
    import_module("mask_rcnn_plus")
    detectron2, missing = import_module("detectron2"), {}

    def note(name: str) -> None:
        missing[name] = getattr(sys.exc_info()[1], "name", "") or repr(sys.exc_info()[1])

    for module in pkgutil.walk_packages(detectron2.__path__, "detectron2.", onerror=note):
        try:
            import_module(module.name)
        except Exception:
            note(module.name)
    return missing


@pytest.mark.slow
def test_every_module_of_detectron2_imports_or_lacks_an_optional_package(fresh) -> None:
    missing = fresh.apply(_unimportable)
    assert set(missing.values()) <= {"onnx", "panopticapi", "lvis", "cityscapesscripts"}, missing


def _missing_extension(capture: Path) -> str | None:
    import_module("mask_rcnn_plus")
    if import_module("mask_rcnn_plus.compat.tools").has_extension():
        return None
    with pytest.raises(ImportError):
        import_module("detectron2._C")
    with capture.open("w") as sys.stdout:
        runpy.run_module("detectron2.utils.collect_env", run_name="__main__")
    return capture.read_text()


def test_missing_extension_stays_missing(fresh, tmp_path) -> None:
    report = fresh.apply(_missing_extension, (tmp_path / "report.txt",))
    if report is None:
        pytest.skip("this detectron2 has its compiled operators")
    assert "not built correctly" in report
