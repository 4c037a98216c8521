"""The properties that torchvision's tests check for its RoI operators, rewritten for ours.

Values and gradients against definitions are in test_roi_align.py and test_quantised.py; this file
has the rest: forms of input, dtypes, refusals, tracing, autocast.
"""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torchvision import ops as torchvision_ops
from torchvision.models.feature_extraction import get_graph_node_names

from mask_rcnn_plus import ops
from mask_rcnn_plus.ops import RoIAlign, RoIPool, RoIWarp, roi_align, roi_pool, roi_warp

# Two images, boxes that share corners with each other and with the map.
BOXES = torch.tensor(
    [[0.0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9], [1, 2.5, 1, 8, 3]]
)
FUNCTIONS = {"roi_align": roi_align, "roi_pool": roi_pool, "roi_warp": roi_warp}
MODULES = {
    "RoIAlign": RoIAlign((5, 5), 1.0, -1),
    "RoIPool": RoIPool((5, 5), 1.0),
    "RoIWarp": RoIWarp((5, 5), 1.0, -1),
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
modules = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def random_maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


class Model(nn.Module):
    """A model that pools, for torch.fx."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return self.pool(maps * 2, boxes)


@pytest.mark.parametrize("name", ["roi_align", "roi_pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_same_call_returns_torchvisions_result(name, dtype, contiguous):
    # The same positional and keyword arguments for both.
    maps = random_maps(2, 6, 10, 12, dtype=dtype)
    if not contiguous:
        maps = maps.transpose(2, 3)
    for arguments in (
        {"output_size": 5},
        {"output_size": (3, 5), "spatial_scale": 0.5},
        {"output_size": [4, 4], "spatial_scale": 2},
    ):
        ours = getattr(ops, name)(maps, BOXES.to(dtype), **arguments)
        theirs = getattr(torchvision_ops, name)(maps, BOXES.to(dtype), **arguments)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@functions
def test_maps_and_boxes_may_be_strided(function):
    maps = random_maps(2, 12, 10, 8)
    wide = torch.stack([BOXES, torch.zeros_like(BOXES)], dim=2)  # every second number is a box's
    expected = function(maps.transpose(2, 3).contiguous(), BOXES, 5)
    for strided in (maps.transpose(2, 3), torch.stack([maps.transpose(2, 3)] * 2)[0]):
        assert torch.equal(function(strided, wide[..., 0], 5), expected)
    every_other = random_maps(2, 24, 20, 16)[:, ::2, ::2, ::2]
    assert not every_other.is_contiguous()
    assert torch.equal(
        function(every_other, BOXES.t().contiguous().t(), 5),
        function(every_other.contiguous(), BOXES, 5),
    )


@functions
def test_gradient_of_strided_maps_and_outputs(function):
    maps = random_maps(1, 2, 5, 6, dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([[0.0, 0, 0, 4, 4], [0, 0, 2, 3, 4], [0, 2, 2, 4, 4]])
    gradcheck(lambda m: function(m.transpose(2, 3), boxes, 2).permute(1, 3, 0, 2), maps)


@functions
def test_boxes_as_rows_or_as_a_list(function):
    maps = random_maps(2, 3, 10, 10)
    parts = [BOXES[BOXES[:, 0] == image, 1:] for image in (0, 1)]
    expected = function(maps, BOXES, 5)
    assert torch.equal(function(maps, parts, 5), expected)
    assert torch.equal(function(maps, tuple(parts), 5), expected)


@functions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_boxes_may_have_another_dtype_than_the_maps(function, dtype):
    # All of BOXES are multiples of 0.5, which are exact in fp16.
    maps = random_maps(2, 3, 10, 10)
    out = function(maps, BOXES.to(dtype), 5)
    assert out.dtype == maps.dtype
    assert torch.equal(out, function(maps, BOXES, 5))


@functions
@pytest.mark.parametrize("boxes", [torch.zeros(1, 4), torch.zeros(5), [torch.zeros(1, 3)]])
def test_boxes_of_a_wrong_shape_raise_torchvisions_error(function, boxes):
    with pytest.raises(AssertionError):
        function(torch.ones(1, 1, 8, 8), boxes, output_size=(2, 2))


quantisation = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@quantisation
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
def test_torchvision_pools_quantised_maps(dtype, aligned):
    maps = random_maps(1, 2, 10, 10)
    maps, boxes = (torch.quantize_per_tensor(t, 0.5, 10, dtype) for t in (maps, BOXES[:3]))
    out = roi_align(maps, boxes, 5, 1.0, 2, aligned)
    expected = torchvision_ops.roi_align(maps, boxes, 5, 1.0, 2, aligned)
    assert out.is_quantized
    assert torch.equal(out.int_repr(), expected.int_repr())


@quantisation
@pytest.mark.parametrize("pool", [roi_pool, roi_warp, lambda *args: roi_align(*args, mode="max")])
def test_other_quantised_maps_are_refused_by_name(pool):
    quantised = torch.quantize_per_tensor(torch.ones(1, 1, 8, 8), 1.0, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"dtype torch\.qint8; RoI operators support float32"):
        pool(quantised, BOXES[:1], 5)


# TorchScript is deprecated, and warns.
scripting = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
native_only = pytest.mark.skipif(ops.backend() != "native", reason="operators are not compiled")


@scripting
@native_only
@functions
def test_functions_can_be_scripted(function):
    scripted = torch.jit.script(function)
    maps = random_maps(2, 3, 10, 10, dtype=torch.float64).requires_grad_()
    lists = [BOXES[:3, 1:], BOXES[3:, 1:]]
    assert torch.equal(scripted(maps, BOXES, 2), function(maps, BOXES, 2))
    assert torch.equal(scripted(maps, lists, [2, 3]), function(maps, BOXES, (2, 3)))
    last = maps.detach().contiguous(memory_format=torch.channels_last)
    out = scripted(last, BOXES, 2, 0.5)
    assert torch.equal(out, function(last, BOXES, 2, 0.5))
    assert out.is_contiguous(memory_format=torch.channels_last)
    gradcheck(lambda x: scripted(x, BOXES, 2), maps)


@scripting
@native_only
@pytest.mark.parametrize(
    "module",
    [*MODULES.values(), RoIAlign(3, 0.5, 2, True, "max"), RoIWarp([2, 3], 0.5, 2, "max")],
    ids=repr,
)
def test_modules_can_be_scripted(module):
    maps = random_maps(2, 3, 10, 10)
    assert torch.equal(torch.jit.script(module)(maps, BOXES), module(maps, BOXES))


@modules
def test_module_equals_its_function(module):
    maps = random_maps(2, 3, 10, 10)
    function = {RoIAlign: roi_align, RoIPool: roi_pool, RoIWarp: roi_warp}[type(module)]
    assert torch.equal(module(maps, BOXES), function(maps, BOXES, (5, 5), 1.0))
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            RoIAlign((7, 7), 0.25, 2, aligned=True),
            "RoIAlign(output_size=(7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=True)",
        ),
        (RoIPool(7, 0.25), "RoIPool(output_size=7, spatial_scale=0.25)"),
        (RoIWarp(7, 0.25, 0), "RoIWarp(output_size=7, spatial_scale=0.25, sampling_ratio=0)"),
        (
            RoIWarp(7, 0.25, 0, "max"),
            "RoIWarp(output_size=7, spatial_scale=0.25, sampling_ratio=0, mode='max')",
        ),
    ],
)
def test_repr(module, expected):
    assert repr(module) == expected


@pytest.mark.parametrize("name", ["RoIAlign", "RoIPool"])
def test_settings_have_torchvisions_names(name):
    settings = {"output_size": (7, 7), "spatial_scale": 0.25}
    if name == "RoIAlign":
        settings |= {"sampling_ratio": 2, "aligned": True}
    ours, theirs = getattr(ops, name)(**settings), getattr(torchvision_ops, name)(**settings)
    for key in settings:
        assert getattr(ours, key) == getattr(theirs, key)


@modules
def test_tracing_records_a_module_as_one_call(module):
    maps = random_maps(2, 3, 10, 10)
    # The module itself, and a model that contains it.
    for model in (module, Model(module)):
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(maps, BOXES), model(maps, BOXES))
        assert torch.equal(graph(maps, BOXES[:2]), model(maps, BOXES[:2]))
        pooling = [n for n in graph.graph.nodes if n.op.startswith("call") and "roi" in str(n)]
        assert len(pooling) == 1


@modules
def test_feature_extraction_names_one_node(module):
    train, evaluation = get_graph_node_names(Model(module))
    assert train == evaluation
    assert len(train) == 4  # two inputs, the multiplication and the pooling


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(function, dtype):
    maps = random_maps(2, 3, 10, 10, dtype=dtype)
    boxes = BOXES + torch.tensor([0, 0.3, 0.3, 0.3, 0.3])
    with torch.autocast("cpu", torch.bfloat16):
        out = function(maps, boxes, 5)
    assert out.dtype == dtype
    assert torch.equal(out, function(maps, boxes, 5))


@pytest.mark.parametrize(
    ("function", "theirs", "options"),
    [
        (roi_align, torchvision_ops.roi_align, {"sampling_ratio": 2, "aligned": True}),
        (roi_align, torchvision_ops.roi_align, {"sampling_ratio": -1}),
        (roi_pool, torchvision_ops.roi_pool, {}),
    ],
)
def test_fp64_maps_are_pooled_at_fp64_boxes(function, theirs, options):
    maps = random_maps(2, 3, 40, 40, dtype=torch.float64).requires_grad_()
    # A third of a pixel is not exact in fp32.
    boxes = BOXES.double() + torch.tensor([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3], dtype=torch.float64)
    out = function(maps, boxes, 5, 0.3, **options)
    expected = theirs(maps, boxes, 5, 0.3, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    given = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    gradients = [torch.autograd.grad(result, maps, given)[0] for result in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["RoIAlign", "RoIWarp"])
def test_module_exports_with_any_number_of_boxes(name):
    maps, module = random_maps(2, 3, 10, 10), MODULES[name]
    shapes = ({}, {0: torch.export.Dim("boxes")})
    exported = torch.export.export(module, (maps, BOXES), dynamic_shapes=shapes).module()
    assert torch.equal(exported(maps, BOXES[:3]), module(maps, BOXES[:3]))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_follows_the_boxes():
    maps, module = random_maps(2, 3, 10, 10), MODULES["RoIAlign"]
    traced = torch.jit.trace(module, (maps, BOXES))
    assert torch.equal(traced(maps, BOXES[:2]), module(maps, BOXES[:2]))
