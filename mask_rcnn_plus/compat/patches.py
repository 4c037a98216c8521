"""detectron2 0.6 on today's torch, NumPy, Pillow, setuptools and Python, without compiling it.

``apply()`` repairs what is broken in the installed detectron2 and changes nothing else. Upstream's
main branch also has the version 0.6, so no patch trusts the version: each looks for its defect
first. Patches change names inside detectron2's own modules; torch, NumPy and Pillow do not change.
Files and lines in the docstrings refer to detectron2's tag v0.6.
"""

import functools
import inspect
import random
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mask_rcnn_plus.compat.clients import (
    export_without_caffe2,
    model_zoo_configs,
    model_zoo_without_pkg_resources,
)
from mask_rcnn_plus.compat.tools import Stub, View, has_extension, lent_module, load, source


def apply() -> list[str]:
    """Repairs the installed detectron2. A second call changes nothing.

    Imports the engine, which imports modeling, data and evaluation. This takes 0.1 s more than
    ``detectron2.modeling``.

    Returns:
        the names of the active patches, which are functions in ``PATCHES``.
    """
    return list(_apply_once())


@functools.cache
def _apply_once() -> tuple[str, ...]:
    return tuple(patch.__name__ for patch in PATCHES if patch())


def layers_without_extension() -> bool:
    """layers/deform_conv.py:11, roi_align_rotated.py:8, rotated_boxes.py:4 import ``_C`` unguarded.

    Symptom: ImportError from all of detectron2's layers if ``_C`` is not compiled, although Mask
    R-CNN calls none of its operators. Fix: a stub during that import. A permanent one would mislead
    utils/collect_env.py:118 and evaluation/fast_eval_api.py:61.
    """
    unguarded = re.search(r"^from detectron2 import _C", source("layers/deform_conv.py"), re.M)
    if not unguarded or has_extension():
        return False
    with lent_module(Stub("detectron2._C")):
        load("layers")
    return True


def extent_transform_default() -> bool:
    """data/transforms/transform.py:46 has the default ``Image.LINEAR``, which Pillow 10 removed.

    Symptom: AttributeError from any import of ``detectron2.data``. Fix: Pillow has the name, once
    an alias of BILINEAR, while the default is evaluated.
    """
    from PIL import Image

    if "Image.LINEAR" not in source("data/transforms/transform.py") or hasattr(Image, "LINEAR"):
        return False
    Image.LINEAR = Image.Resampling.BILINEAR
    try:
        load("data.transforms")
    finally:
        del Image.LINEAR
    return True


def removed_numpy_names() -> bool:
    """data/build.py:171,175 use ``np.int``; structures/masks.py:33,36,344 use ``np.bool``.

    Symptom: AttributeError when the training loader counts its instances; with NumPy 1.24 to 1.26,
    which lack ``np.bool``, also from polygon masks. Fix: those modules see a NumPy in which these
    names are Python's types, as in the past.
    """
    needed = False
    for module, name, kind in (("data.build", "int", int), ("structures.masks", "bool", bool)):
        used = f"np.{name})" in source(module.replace(".", "/") + ".py")
        if used and name not in vars(np):
            load(module).np = View(np, **{name: kind})
            needed = True
    return needed


class _SetSampler(random.Random):
    def sample(self, population: Any, k: int, **kwargs: Any) -> list[Any]:
        # Sorted, because the seed does not fix the order of a set.
        ordered = sorted(population) if isinstance(population, set) else population
        return super().sample(ordered, k, **kwargs)


def retry_after_skipped_image() -> bool:
    """data/common.py:98 samples from a set, which Python 3.11 refuses.

    Symptom: TypeError in the loader when a mapper returns None to skip an image. Fix: that module
    sees a ``random.Random`` that sorts a set and samples from the list.
    """
    common = load("data.common")
    try:
        common.MapDataset([None, 0], lambda sample: sample)[0]
    except (TypeError, DeprecationWarning):
        common.random = View(random, Random=_SetSampler)
        return True
    return False


def writable_masks() -> bool:
    """data/detection_utils.py:433 passes Pillow's read-only arrays to torch.

    Symptom: a UserWarning about undefined behaviour at the first bitmask that was resized but not
    flipped. Fix: that module's ``np.ascontiguousarray`` copies read-only arrays.
    """
    if "torch.from_numpy(np.ascontiguousarray(x))" not in source("data/detection_utils.py"):
        return False

    def ascontiguousarray(values: Any) -> np.ndarray:
        return np.require(values, requirements=["C", "W"])

    load("data.detection_utils").np = View(np, ascontiguousarray=ascontiguousarray)
    return True


def meshgrid_indexing() -> bool:
    """modeling/anchor_generator.py:48 omits ``indexing``, whose default torch will change.

    Symptom: a UserWarning at the first step; with the other default, transposed anchors. Fix: that
    module sees a ``torch.meshgrid`` that uses "ij". It is a typed function of two tensors because
    TorchScript, which compiles the generator, does not support ``functools.partial``.
    """
    if "torch.meshgrid(shifts_y, shifts_x)" not in source("modeling/anchor_generator.py"):
        return False

    def meshgrid(rows: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
        return torch.meshgrid([rows, columns], indexing="ij")

    load("modeling.anchor_generator").torch = View(torch, meshgrid=meshgrid)
    return True


def fast_coco_evaluator() -> bool:
    """evaluation/coco_evaluation.py:22 imports fast_eval_api.py, which needs the compiled ``_C``.

    Symptom: v0.6 cannot import ``detectron2.evaluation``; main can, but evaluates with pycocotools,
    several times slower. Fix: our ``compat.coco_eval`` replaces that module.
    """
    name = "detectron2.evaluation.fast_eval_api"
    if has_extension() or name in sys.modules or "detectron2.evaluation" in sys.modules:
        return False
    from mask_rcnn_plus.compat import coco_eval

    sys.modules[name] = coco_eval
    return True


def coco_json_encoding() -> bool:
    """pycocotools/coco.py:81,320 reads a json in the encoding of the locale.

    Symptom: UnicodeDecodeError with LC_ALL=C or on Windows, and JSONDecodeError from a file with a
    byte order mark. Fix: that module opens bytes, of which json recognises UTF-8, 16 and 32.
    """
    from pycocotools import coco

    if "with open(annotation_file, 'r')" not in inspect.getsource(coco.COCO.__init__):
        return False

    def open_bytes(path: str, mode: str = "r") -> BinaryIO:
        return Path(path).open("rb")

    vars(coco)["open"] = open_bytes
    return True


def masks_to_arrays() -> bool:
    """evaluation/coco_evaluation.py:406 copies a tensor with ``np.array``.

    Symptom: NumPy 2 warns at every mask, because the tensor's ``__array__`` does not accept
    ``copy``. Fix: that module's ``np.array`` starts from the tensor's own array.
    """
    takes_copy = "copy" in inspect.signature(torch.Tensor.__array__).parameters
    if takes_copy or "np.array(mask[" not in source("evaluation/coco_evaluation.py"):
        return False

    def array(values: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        plain = values.numpy() if isinstance(values, torch.Tensor) else values
        return np.array(plain, *args, **kwargs)

    load("evaluation.coco_evaluation").np = View(np, array=array)
    return True


def stock_scheduler_state() -> bool:
    """engine/hooks.py:365,370 test for ``_LRScheduler``, which torch's schedulers no longer extend.

    Symptom: silent. Since torch 2.0 the state of a stock scheduler is neither saved nor restored,
    and a resumed run decays at other iterations. Fix: that module sees the base class of all
    schedulers under the old name.
    """
    hooks = load("engine.hooks")
    base = torch.optim.lr_scheduler.LRScheduler

    class Probe(base):
        def __init__(self) -> None:
            self.last_epoch = 0  # the whole state; a real one would need an optimizer

    if hooks.LRScheduler(scheduler=Probe()).state_dict():
        return False
    schedulers = View(torch.optim.lr_scheduler, _LRScheduler=base)
    hooks.torch = View(torch, optim=View(torch.optim, lr_scheduler=schedulers))
    return True


def _edit_distributed_arguments(edit: Callable[[torch.nn.Module, dict[str, Any]], None]) -> None:
    engine = load("engine")
    original = engine.defaults.create_ddp_model

    @functools.wraps(original)
    def create_ddp_model(model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        edit(model, kwargs)
        return original(model, **kwargs)

    engine.create_ddp_model = engine.defaults.create_ddp_model = create_ddp_model


def distributed_on_cpu() -> bool:
    """engine/defaults.py:72 sets a GPU for every model that it wraps, also in main.

    Symptom: ValueError from DistributedDataParallel for a model on the CPU, so in every run with
    several gloo processes. Fix: no device is set for such a model.
    """
    if 'kwargs["device_ids"] = [comm.get_local_rank()]' not in source("engine/defaults.py"):
        return False

    def edit(model: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            kwargs.setdefault("device_ids", None)

    _edit_distributed_arguments(edit)
    return True


def distributed_buffers() -> bool:
    """engine/defaults.py:380 passes ``broadcast_buffers``, which torch 2.14 deprecates.

    Symptom: a FutureWarning from each process. Fix: the argument's new name. Buffers are then
    copied once at the start and not between steps, as torch did when v0.6 was written.
    """
    arguments = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    old_name = "broadcast_buffers=False" in source("engine/defaults.py")
    if "forward_sync_buffers" not in arguments or not old_name:
        return False

    def edit(model: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        if "broadcast_buffers" in kwargs:
            kwargs["forward_sync_buffers"] = kwargs.pop("broadcast_buffers")

    _edit_distributed_arguments(edit)
    return True


def mixed_precision_names() -> bool:
    """engine/train_loop.py:377,388 import from ``torch.cuda.amp``, which torch deprecates.

    Symptom: a FutureWarning from SOLVER.AMP at each step. The names are imported inside methods,
    which a view cannot change, so this silences that warning in that module only.
    """
    old_names = "from torch.cuda.amp import" in source("engine/train_loop.py")
    if old_names:
        module = r"detectron2\.engine\.train_loop$"
        warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.", FutureWarning, module)
    return old_names


# Each returns whether it was needed. They are in the order of the imports that they make possible.
PATCHES = (
    layers_without_extension,
    extent_transform_default,
    removed_numpy_names,
    retry_after_skipped_image,
    writable_masks,
    meshgrid_indexing,
    fast_coco_evaluator,
    coco_json_encoding,
    masks_to_arrays,
    stock_scheduler_state,
    distributed_on_cpu,
    distributed_buffers,
    mixed_precision_names,
    model_zoo_without_pkg_resources,
    model_zoo_configs,
    export_without_caffe2,
)
