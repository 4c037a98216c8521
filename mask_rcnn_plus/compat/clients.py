"""Patches that programs on top of detectron2 need: model zoo and export. See patches.py."""

import contextlib
import importlib.resources
import importlib.util
import sys
from pathlib import Path
from typing import Any

from mask_rcnn_plus.compat.tools import Stub, lent_module, load, source

# A link to configs/coco; in a wheel, a copy. Names and settings are those of detectron2's zoo.
_CONFIGS = Path(__file__).with_name("model_zoo")
# The start of a config's name -> its folder in the zoo.
_ZOO_FOLDERS = {
    "Base-RCNN": "",
    "faster_rcnn": "COCO-Detection",
    "mask_rcnn": "COCO-InstanceSegmentation",
    "keypoint_rcnn": "COCO-Keypoints",
    "cascade_mask_rcnn": "Misc",
}


def model_zoo_without_pkg_resources() -> bool:
    """model_zoo/model_zoo.py:4 imports ``pkg_resources``, which setuptools 82 removed.

    Symptom: ModuleNotFoundError from ``detectron2.model_zoo``, which looks up COCO weights. Fix:
    during that import, a stub of ``pkg_resources`` with the only function that the module calls.
    """
    name = "pkg_resources"
    exists = name in sys.modules or importlib.util.find_spec(name)
    if exists or f"import {name}" not in source("model_zoo/model_zoo.py"):
        return False

    def resource_filename(package: str, resource: str) -> str:
        return str(importlib.resources.files(package) / resource)

    stand_in = Stub(name)
    stand_in.resource_filename = resource_filename
    with lent_module(stand_in):
        load("model_zoo")
    return True


def model_zoo_configs() -> bool:
    """model_zoo/model_zoo.py:119 looks for YAMLs beside itself, which redistributions leave out.

    Symptom: RuntimeError "not available in Model Zoo" for every name. Fix: return the
    paths of our own configs of the zoo's R-CNNs, which have detectron2's keys and our ROI heads.
    """
    load("model_zoo")
    zoo = sys.modules["detectron2.model_zoo.model_zoo"]
    if Path(zoo.__file__ or "").with_name("configs").is_dir() or not _CONFIGS.is_dir():
        return False
    original = zoo.get_config_file

    def get_config_file(config_path: str) -> str:
        """Returns the path of a config, such as "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"."""
        file = _CONFIGS / Path(config_path).name
        known = [
            Path(folder, file.name)
            for start, folder in _ZOO_FOLDERS.items()
            if file.name.startswith(start)
        ]
        if Path(config_path) in known and file.is_file():
            return str(file)
        try:
            return original(config_path)
        except RuntimeError as error:
            if Path(config_path).is_file():  # sahi tries the zoo before the file
                raise
            hint = "give the path of the YAML in a clone of detectron2 (docs/clients.md)"
            raise RuntimeError(f"{error} Instead, {hint}") from error

    zoo.get_config_file = sys.modules["detectron2.model_zoo"].get_config_file = get_config_file
    return True


class _Caffe2(Stub):
    """A module of Caffe2 whose classes and functions raise ImportError when they are used."""

    def __getattr__(self, name: str) -> Any:
        if not name[0].isupper():
            return super().__getattr__(name)

        def use(*_: Any, **__: Any) -> None:
            raise ImportError(
                f"{self.__name__}.{name} needs Caffe2, which PyTorch no longer contains: use "
                "detectron2.export.TracingAdapter instead"
            )

        return type(name, (), {"__new__": use})


def export_without_caffe2() -> bool:
    """export/api.py:6 and others import Caffe2, which torch no longer contains.

    Symptom: ModuleNotFoundError from ``detectron2.export`` and ``utils.analysis``, so
    TracingAdapter and FlopCountAnalysis cannot be imported. Fix: stubs during that import.
    Functions that export to Caffe2 raise an ImportError when they are called.
    """
    unguarded = "\nfrom caffe2.proto import" in source("export/api.py")
    if not unguarded or importlib.util.find_spec("caffe2"):
        return False
    parts = ("", ".proto", ".proto.caffe2_pb2", ".python", ".python.core", ".python.net_drawer")
    with contextlib.ExitStack() as stack:
        for part in (*parts, ".python.utils", ".python.workspace"):
            stack.enter_context(lent_module(_Caffe2(f"caffe2{part}")))
        load("export")
    return True
