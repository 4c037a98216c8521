"""Commands start without a home folder, and say when their working directory is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a container started with --user has: no HOME, and no entry for the user.
NO_HOME = """
import os, pwd, runpy, sys
os.environ.pop("HOME", None)
def unknown(*args):
    raise KeyError("uid not found")
pwd.getpwuid = unknown
"""
# Code that prepares the environment of a command, without its slow imports.
PREPARE = {
    "train_net.py": (
        f"text = open({str(ROOT / 'train_net.py')!r}).read()\n"
        "exec(compile(text.split('if __name__')[0], 'train_net.py', 'exec'))\n"
    ),
    "mask-rcnn-plus": "from mask_rcnn_tools import cli\ncli._prepare_environment()\n",
}


def run(code: str, *, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.parametrize("command", PREPARE)
def test_without_a_home_caches_go_into_the_temporary_folder(command: str) -> None:
    show = "import getpass, pathlib\nprint(pathlib.Path.home(), getpass.getuser())\n"
    done = run(NO_HOME + "os.environ.pop('USER', None)\n" + PREPARE[command] + show)
    assert done.returncode == 0, done.stderr
    assert f"/mask_rcnn_plus_{os.getuid()} " in done.stdout


@pytest.mark.parametrize("command", PREPARE)
def test_a_home_stays(command: str, tmp_path: Path) -> None:
    code = f"import os\nos.environ['HOME'] = {str(tmp_path)!r}\n" + PREPARE[command]
    assert run(code + "print(os.environ['HOME'])").stdout.strip() == str(tmp_path)


@pytest.mark.parametrize("command", ["train_net.py", "mask-rcnn-plus"])
def test_a_deleted_working_directory_is_one_line(command: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    leave = f"import os, sys\nos.chdir({str(gone)!r})\nos.rmdir({str(gone)!r})\n"
    code = PREPARE["train_net.py"]
    if command == "mask-rcnn-plus":
        code = "from mask_rcnn_tools import cli\nsys.exit(cli.main(['doctor']))\n"
    done = run(leave + code)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "working directory" in done.stderr
