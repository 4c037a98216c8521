"""The command mask-rcnn-plus: help, mistakes in the command's name, errors of a tool."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.cli import COMMANDS, PROGRAM, main

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
    for arguments, code in (["--help"], 0), (["--version"], 0), ([], 2):
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
    ("words", "expected"),
    [
        (["chek-data", "balloons_train"], "no command 'chek-data'; did you mean 'check-data'?"),
        (["benchmark", "roi-align"], "benchmarks"),
        (["ablate"], "python -m benchmarks.ablate"),
        (["zzz"], "no command 'zzz'; see mask-rcnn-plus --help"),
        (["--device", "cpu"], "no command '--device'"),
    ],
)
def test_an_unknown_command_is_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (UserError("photo.jpg is no image"), 2, "error: photo.jpg is no image\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_what_a_tool_raises_becomes_one_line(
    raised: BaseException,
    code: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tool(arguments: list[str]) -> int:
        assert arguments == ["--repeats", "1"]
        raise raised

    monkeypatch.setattr("mask_rcnn_tools.show_data.main", tool)
    assert main(["show-data", "--repeats", "1"]) == code
    assert capsys.readouterr().err.startswith(expected)


def test_a_tool_that_is_terminated_ends_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def tool(arguments: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        finally:
            ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mask_rcnn_tools.show_data.main", tool)
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["show-data"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_.value.code == 143 and ended == [True]


def test_output_that_nobody_reads_is_no_traceback() -> None:
    code = "import sys; from mask_rcnn_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check-data", "--help"]
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def tool(arguments: list[str]) -> int:
        raise ModuleNotFoundError("", name="tqdm")

    monkeypatch.setattr("mask_rcnn_tools.show_data.main", tool)
    with pytest.raises(ModuleNotFoundError):
        main(["show-data"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_says_what_it_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = COMMANDS[name]
    assert callable(importlib.import_module(f"mask_rcnn_tools.{module}").main)
    with pytest.raises(SystemExit) as exit_:
        main([*name.split(), "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {PROGRAM} {name} ")


def test_the_pages_name_commands_that_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"uv run mask-rcnn-plus ([a-z][^`\n]*)", text)
    assert len(named) > 15
    for words in named:  # and, after convert, its format and files
        assert any(words.strip() == n or words.startswith(f"{n} ") for n in COMMANDS), words
