"""The program mask-rcnn-plus: help, unknown commands, errors of a command."""

import errno
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.cli import COMMANDS, main
from mask_rcnn_tools.terminal import PROGRAM, quote, shell_command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", *(ROOT / "docs").glob("*.md")]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        assert main([option]) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name}  ", out, re.MULTILINE) for name in COMMANDS)


# Runs the program, or a script, in a process in which torch and detectron2 cannot be imported.
LIGHT = """if True:
    import runpy, sys
    sys.modules["torch"] = sys.modules["detectron2"] = None
    if sys.argv[1].endswith(".py"):
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    from mask_rcnn_tools.cli import main
    sys.exit(main())
"""
CONFIG = str(ROOT / "configs/quickstart.yaml")
TRAIN = str(ROOT / "train_net.py")
# Command -> arguments that are complete but for a missing file, and its name.
MISSING_FILE = {
    "predict": ["--weights", "no.pth", "."],
    "models": ["no"],
    "report": ["no"],
    "convert": ["yolo", "no", "--output", "out"],
    "check-data": ["--json-file", "no.json", "--image-root", "."],
    "show-data": ["--config-file", "no.yaml", "--output", "out.png"],
    "fit-anchors": ["--config-file", "no.yaml"],
    "lr-range": ["--config-file", "no.yaml"],
    "convert-torchvision": ["no.pth", "out.pth"],
    "stock-config": ["--weights", "no.pth", "--output", "out.yaml"],
    "doctor": ["--json", "no/doctor.json"],
    TRAIN: ["--config-file", "no.yaml"],
}


def run_light(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIGHT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("name", [*COMMANDS, TRAIN])
def test_help_and_mistakes_are_answered_without_torch(name: str, tmp_path: Path) -> None:
    done = run_light(name, "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    for arguments, word in (
        (["--nope"], "--help"),
        (MISSING_FILE[name], "no"),
        ([*MISSING_FILE[name], "--nope"], "--help"),
    ):
        done = run_light(name, *arguments, folder=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert word in done.stderr and done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predict", "--weights", CONFIG, "phots"], "'photos'?"),
        (["predict", "--weights", CONFIG, "photos", "--like", "no.json"], "no.json"),
        (["predict", "--weights", CONFIG, "photos", "--config-file", "no.yaml"], "no.yaml"),
        (["predict", "--weights", CONFIG, "photos", "--score-threshold", "2"], "from 0 to 1"),
        (["predict", "photos", "--config-file", CONFIG], "--weights"),
        (["report", "photos", "--output", "file"], "not a report"),
        (["report", "photos", "--json-file", "no.json"], "no.json"),
        (["report", "photos", "./photos"], "same folder"),
        (["convert", "foo"], "unknown format 'foo'"),
        (["convert", "voc", "file", "--output", "out"], "not a folder"),
        (["convert", "yolo", "photos", "--output", "photos/out"], "inside SOURCE"),
        (["check-data", "x_train", "--repair", "file"], "--overwrite"),
        (["check-data", "x_train", "--json", "no/out.json"], "folder that exists"),
        (["check-data", "x_train", "--config-file", "photos"], "'photos' is not a file"),
        (["show-data", "--config-file", CONFIG, "--output", "out.gif"], ".png"),
        (["show-data", "--config-file", CONFIG, "--output", "out.png", "SEED"], "SEED"),
        (["fit-anchors", "--config-file", CONFIG, "--output", "file"], "--overwrite"),
        (["lr-range", "--config-file", CONFIG, "--output", "file"], "file"),
        (["lr-range", "--config-file", CONFIG, "SEED", "1", "--start", "1"], "--start"),
        (["convert-torchvision", "file", "file"], "--overwrite"),
        ([TRAIN, "--config-file", "photos"], "'photos' is a folder"),
        ([TRAIN, "--config-file", CONFIG, "SEED", "1", "--resume"], "--resume"),
        ([TRAIN, "--config-file", CONFIG, "SEED"], "SEED"),
        ([TRAIN, "--config-file", CONFIG, "--num-gpus", "0"], "--num-gpus"),
        (["predict", "--weights", CONFIG, "photos", "--device", "gpu"], "'gpu'"),
        (["report", "photos"], "evaluated"),
    ],
)
def test_arguments_are_checked_without_torch(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").write_text("mine")
    done = run_light(*arguments, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [*COMMANDS, TRAIN])
def test_paths_that_cannot_be_opened_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("x" * 300, "loop", "two\nlines/x"):
        arguments = [path if word.startswith("no") else word for word in MISSING_FILE[name]]
        done = run_light(name, *arguments, folder=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_deleted_working_directory_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = LIGHT.replace("import runpy", "import os; os.rmdir(os.getcwd()); import runpy")
    command = [sys.executable, "-c", script, name, *MISSING_FILE[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path / "gone", env=environment
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "working directory" in done.stderr


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
        (["ablate"], "-m benchmarks.ablate"),
        (["train"], "train_net.py --config-file"),
        (["val"], "--eval-only"),
        (["segment", "photo.jpg"], "mask-rcnn-plus predict"),
        (["export"], "BatchPredictor"),
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


@pytest.mark.parametrize("sink", ["closed", "/dev/full"])
def test_output_that_nobody_can_read_does_not_stop_a_command(sink: str, tmp_path: Path) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from mask_rcnn_tools.arguments import run_command

        def work(arguments):
            print("x" * 100_000)
            print("more", flush=True)
            Path(arguments[0]).write_text("whole")
            print("the end")
            return 0

        sys.exit(run_command(work, sys.argv[1:]))
    """
    if sink == "closed":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(sink, os.O_WRONLY)
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "whole"
    if sink == "closed":
        assert done.stderr == ""
    else:
        assert "incomplete" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_needs_no_open_streams(closed: str, tmp_path: Path) -> None:
    program = """if True:
        import os, sys
        from pathlib import Path
        from mask_rcnn_tools.arguments import run_command

        def work(arguments):
            with open(arguments[0], "w") as file:
                print("to the screen", flush=True)
                print("to the screen", file=sys.stderr, flush=True)
                os.write(1, b"a library's message")
                file.write("whole")
            return 3

        sys.exit(run_command(work, sys.argv[1:]))
    """
    shell = f'"$@" {closed}'
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "file").read_text() == "whole"


def test_output_cannot_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str]) -> int:
        print("cat\x1b[2J\t猫 \u202egpj.exe \udc80")
        print("warning: \x9b1A", file=sys.stderr)
        raise UsageError("no \x07 here")

    monkeypatch.setattr("mask_rcnn_tools.show_data.command.main", command)
    assert main(["show-data"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "cat\\x1b[2J\t猫 \\u202egpj.exe \\udc80\n"
    assert captured.err == "warning: \\x9b1A\nerror: no \\x07 here\n"


def test_output_that_the_locale_lacks_is_escaped() -> None:
    program = """if True:
        import sys
        from mask_rcnn_tools.arguments import run_command
        sys.exit(run_command(lambda _: print("猫 ±0") or 0, []))
    """
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (0, "\\u732b \\xb10\n"), done.stderr


def test_an_error_of_the_operating_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "page.html")

    monkeypatch.setattr("mask_rcnn_tools.show_data.command.main", command)
    assert main(["show-data"]) == 2
    assert capsys.readouterr().err == "error: 'page.html': No space left on device\n"


def test_printed_commands_begin_as_the_user_began(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["DATASETS.TRAIN", "('my set_train',)", "OUTPUT_DIR", "a b"]
    quoted = "DATASETS.TRAIN \"('my set_train',)\" OUTPUT_DIR 'a b'"
    assert shlex.split(quoted) == keys
    monkeypatch.setattr(sys, "argv", ["/somewhere/mask-rcnn-plus", "convert"])
    assert shell_command(PROGRAM, "predict") == "/somewhere/mask-rcnn-plus predict"
    monkeypatch.setattr(sys, "argv", ["/somewhere/mask_rcnn_tools/cli.py", "convert"])
    assert shell_command(PROGRAM, *keys).endswith(f" -m mask_rcnn_tools.cli {quoted}")
    assert shlex.split(shell_command("train_net.py"))[1:] == ["train_net.py"]
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert shell_command(PROGRAM, *keys) == f"uv run mask-rcnn-plus {quoted}"
    assert shell_command("train_net.py") == "uv run train_net.py"


@pytest.mark.parametrize(
    "word", ["a b", "it's", "$HOME", "`x`'", '"', "a!b'", "-", "", "x\ny'", "('a',)"]
)
def test_quoted_words_come_back_from_a_shell(word: str) -> None:
    assert shlex.split(quote(word)) == [word]
    assert subprocess.check_output(["sh", "-c", f"printf %s {quote(word)}"], text=True) == word


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> int:
        raise ModuleNotFoundError("", name="tqdm")

    monkeypatch.setattr("mask_rcnn_tools.show_data.command.main", command)
    with pytest.raises(ModuleNotFoundError):
        main(["show-data"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = COMMANDS[name]
    assert callable(importlib.import_module(f"mask_rcnn_tools.{folder}.command").main)
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


def test_a_missing_detectron2_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    done = run_light("check-data", "--json-file", "a.json", "--image-root", ".", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "detectron2" in done.stderr
