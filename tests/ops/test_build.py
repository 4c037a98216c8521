"""The build of the operators' library."""

import sys

import setuptools

from mask_rcnn_plus.ops import build


def test_installation_without_torch_warns_and_continues(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import fails
    extension = setuptools.Extension("package._roi_cpu", ["package/roi_ops.cpp"])
    builder = build.BuildOperators(setuptools.Distribution({"ext_modules": [extension]}))
    warnings = []
    monkeypatch.setattr(builder, "warn", warnings.append)
    builder.build_extension(extension)
    assert "install torch first and pass --no-build-isolation" in warnings[0]
