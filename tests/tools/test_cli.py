"""The program mask-rcnn-plus: help, unknown commands, errors of a command."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.cli import COMMANDS, LIGHT, PROGRAM, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", *(ROOT / "docs").glob("*.md")]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        assert main([option]) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name}  ", out, re.MULTILINE) for name in COMMANDS)


def test_help_does_not_wait_for_torch() -> None:
    program = """if True:
        import sys
        from mask_rcnn_tools.cli import main
        code = main()
        sys.exit(9 if "torch" in sys.modules else code)
    """
    for arguments, code in (
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        *(([name, "--help"], 0) for name in LIGHT),
    ):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    _, _, examples = capsys.readouterr().out.lower().partition("\nexample")
    assert f"{PROGRAM} {name} " in examples or f"{PROGRAM} {name}\n" in examples


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"mask-rcnn-plus \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_without_a_command_the_help_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "check-data" in captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chek-data", "balloons_train"], "no command 'chek-data'; did you mean 'check-data'?"),
        (["benchmark", "roi-align"], "benchmarks"),
        (["ablate"], "python -m benchmarks.ablate"),
        (["zzz"], "no command 'zzz'; see mask-rcnn-plus --help"),
        (["--device", "cpu"], "no command '--device'"),
    ],
)
def test_an_unknown_command_gives_a_one_line_error(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (UserError("photo.jpg is not an image"), 2, "error: photo.jpg is not an image\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_an_error_in_a_command_is_one_line(
    raised: BaseException,
    code: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(arguments: list[str]) -> int:
        assert arguments == ["--repeats", "1"]
        raise raised

    monkeypatch.setattr("mask_rcnn_tools.show_data.command.main", command)
    assert main(["show-data", "--repeats", "1"]) == code
    assert capsys.readouterr().err.startswith(expected)


def test_a_terminated_command_runs_its_cleanup(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def command(arguments: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        finally:
            ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mask_rcnn_tools.show_data.command.main", command)
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["show-data"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_.value.code == 143 and ended == [True]


@pytest.mark.slow
def test_a_closed_output_prints_no_traceback() -> None:
    code = "import sys; from mask_rcnn_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    args = [sys.executable, "-c", code, "check-data", "--help"]
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(args, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> int:
        raise ModuleNotFoundError("", name="tqdm")

    monkeypatch.setattr("mask_rcnn_tools.show_data.command.main", command)
    with pytest.raises(ModuleNotFoundError):
        main(["show-data"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = COMMANDS[name]
    assert callable(importlib.import_module(f"mask_rcnn_tools.{module}").main)
    with pytest.raises(SystemExit) as exit_:
        main([*name.split(), "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {PROGRAM} {name} ")


def test_the_commands_in_the_pages_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"uv run mask-rcnn-plus ([a-z][^`\n]*)", text)
    assert len(named) > 15
    for command in named:
        assert any(command.strip() == n or command.startswith(f"{n} ") for n in COMMANDS), command
