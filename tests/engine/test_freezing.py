"""MODEL.FREEZE: frozen weights and statistics do not change; invalid patterns are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine import main
from mask_rcnn_plus.engine.freezing import freeze, freeze_mode


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
        self.stem_2 = nn.BatchNorm2d(2)
        self.res2 = nn.Linear(2, 2)
        self.res3 = nn.Linear(2, 2)


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["stem"], {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}),
        (["res[2-3]"], {"res2.weight", "res2.bias", "res3.weight", "res3.bias"}),
        (["res2.weight", "stem_2"], {"res2.weight", "stem_2.weight", "stem_2.bias"}),
        (["*bias"], {"stem.0.bias", "stem.1.bias", "stem_2.bias", "res2.bias", "res3.bias"}),
    ],
)
def test_a_pattern_matches_modules_and_parameters(patterns: list[str], expected: set[str]) -> None:
    model = Model()
    freeze(model, patterns)
    assert frozen(model) == expected


def test_frozen_statistics_and_dropout_stay_in_evaluation_mode() -> None:
    model = Model().train()
    freeze_mode(model, ["stem"])
    assert not model.stem[1].training and not model.stem[2].training
    # Other norms train, and so do modules whose mode only selects losses or predictions.
    assert model.stem_2.training and model.stem.training and model.training


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stm", "'stm' matches no module or parameter; did you mean 'stem'"),
        ("tail", "matches no module or parameter; modules: stem, stem_2, res2, res3"),
        ("res2.weigth", "did you mean 'res2.weight'"),
        ("res[", "'res[' matches no module or parameter"),
        ("*", "leaves nothing to train"),
    ],
)
def test_invalid_patterns_are_refused(pattern: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        freeze(Model(), [pattern])
    assert expected in str(error.value)


def test_no_pattern_runs_long() -> None:
    with pytest.raises(UserError):
        freeze(Model(), ["*a" * 5000 + "!"])
    with pytest.raises(UserError):
        freeze(Model(), ["(a+)+$", "(.+)+!"])


def test_frozen_stages_keep_weights_and_statistics_and_others_change(
    small_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ["backbone.bottom_up.stem", "backbone.bottom_up.res[23]", "proposal_generator"]
    command = ["--config-file", str(small_config), "SOLVER.MAX_ITER", "4"]
    command += ["SOLVER.BASE_LR", "0.001"]
    assert main([*command, "MODEL.FREEZE", str(frozen)]) == 0
    # A convolution of 3 x 4 x 7 x 7, a scale and a shift.
    line = "MODEL.FREEZE 'backbone.bottom_up.stem': 3 tensors, 596 parameters"
    assert line in capsys.readouterr().out
    early, late = (
        torch.load(tmp_path / "output" / f"{name}.pth", weights_only=True)["model"]
        for name in ("model_0000001", "model_final")
    )
    same = {name for name in early if torch.equal(early[name], late[name])}
    kept = tuple(f"backbone.bottom_up.{n}." for n in ("stem", "res2", "res3"))
    expected = {name for name in early if name.startswith((*kept, "proposal_generator."))}
    assert any(name.endswith("running_mean") for name in expected)
    assert same == expected

    # The optimizer's state covers other parameters then: a resumed run must freeze the same.
    again = ["--resume", *command, "SOLVER.MAX_ITER", "5", "MODEL.FREEZE", str(frozen[:1])]
    assert main(again) == 2
    assert "trained with other parameters frozen" in capsys.readouterr().err
