"""python -m benchmarks.options: one row per option."""

import logging
from pathlib import Path

import pytest

from benchmarks.options import OPTIONS, main
from mask_rcnn_plus import UserError


@pytest.mark.slow
def test_every_option_is_timed(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("detectron2").setLevel(logging.NOTSET)  # as in a new process
    command = ["--config-file", str(tiny_config), "--rounds", "1", "--steps", "1"]
    assert main([*command, "MODEL.ROI_HEADS.NAME", "FusedROIHeads"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| option ")  # and not with a printed model
    table = out.split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in table]
    assert [row[0] for row in rows] == list(OPTIONS)
    assert rows[0][2] == "1.00"
    assert all(float(number) > 0 for row in rows for number in row[1:])
    assert "TEST.LOSS_PERIOD: an image takes" in out
    with pytest.raises(UserError, match="does not support: set FusedROIHeads"):
        main(command)
