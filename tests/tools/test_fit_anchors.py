"""mask-rcnn-plus fit-anchors: from a config and a data set to config lines."""

import re
from pathlib import Path

import pytest
import yaml

from mask_rcnn_plus.config import load_config
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.fit_anchors.fitting import config_anchors


def test_the_fitted_anchors_cover_more_and_the_config_accepts_them(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "anchors.yaml"
    command = ["fit-anchors", "--config-file", str(tiny_config), "--output", str(output)]
    assert main([*command, "shapes_train"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(output.read_text())
    rows = dict(re.findall(r"^at (training size, \w+) +[\d.]+% +([\d.]+)%", printed, re.MULTILINE))
    assert float(rows["training size, fitted"]) > float(rows["training size, now"])
    # The number of anchors and the feature maps stay, and the config accepts the lines.
    merged = tmp_path / "merged.yaml"
    merged.write_text(output.read_text() + f'_BASE_: "{tiny_config.name}"\n')
    before, after = (config_anchors(load_config(path)) for path in (tiny_config, merged))
    assert after.strides == before.strides == (4, 8, 16, 32, 64)
    assert [len(level) for level in after.sizes] == [1] * 5 and after.sizes != before.sizes
    assert after.ratios == (after.ratios[0],) * 5 and len(after.ratios[0]) == 3

    # The output is checked before the work starts.
    missing = [*command[:-1], str(tmp_path / "gone" / "anchors.yaml")]
    for wrong in (missing, [*command[:-1], str(tmp_path), "--overwrite"]):
        assert main(wrong) == 2
        printed = capsys.readouterr()
        assert "name a file in a folder that exists" in printed.err and printed.out == ""
    assert main(command) == 2
    assert "exists; name another file, or give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"NAME": "RotatedAnchorGenerator"}, "can fit only DefaultAnchorGenerator"),
        ({"SIZES": [[8], [16]]}, "lists of 1 list, or of 5"),
        (
            {"SIZES": [[8], [16], [32], [64], [128, 256]]},
            "the same number of values on each",
        ),
    ],
)
def test_anchors_that_cannot_be_fitted_are_refused(
    tiny_config: Path,
    capsys: pytest.CaptureFixture[str],
    generator: dict[str, object],
    message: str,
) -> None:
    content = yaml.safe_load(tiny_config.read_text())
    content["MODEL"]["ANCHOR_GENERATOR"] = generator
    tiny_config.write_text(yaml.safe_dump(content))
    assert main(["fit-anchors", "--config-file", str(tiny_config)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_wrong_name_gives_a_one_line_error(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit-anchors", "--config-file", str(tiny_config), "shapes_trian"]) == 2
    assert "did you mean 'shapes_train'" in capsys.readouterr().err
