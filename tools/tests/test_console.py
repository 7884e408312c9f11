"""What a verb says where a package is missing: one line with the command that installs it."""

import ast
import os
import re
import socket
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from stonechat_tools import console
from stonechat_tools.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "stonechat_tools"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED_FOR_BY_NAME = {
    "tflite_micro",
    "sklearn",
    "psutil",
    "AWSIoTDeviceDefenderAgentSDK",
    "amqtt",
    "scipy",
    "websockets",
    "grafana_foundation_sdk",
}  # peers of a bench, and what proofs drive a browser with

WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from stonechat_tools.cli import main
sys.exit(main(sys.argv[2:]))
"""


def without(packages: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_without_any_package_prints_its_help_or_one_line(verb: str) -> None:
    packages = [name for name in console.EXTRAS if name != "stonechat_tools"]
    done = without(",".join([*packages, "stonechat_tools.lab", "stonechat_tools.proofs"]), verb, "--help")
    if done.returncode == 0:
        assert done.stdout.startswith(f"usage: stonechat {verb}")
    else:
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"stonechat {verb}: needs ") and done.stderr.count("\n") == 1
        assert "-m pip install 'stonechat[" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "none.x"),
        ("train", "none.x", "-o", "out"),
        ("calibrate", "none.x", "none.x", "--budget", "1/30d", "-o", "out"),
        ("evaluate", "none.x", "none.x"),
        ("record", "out.csv.gz", "--counters", "none.x"),
    ],
)
def test_a_file_that_is_not_there_is_named_as_other_commands_name_it(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 1
    assert capsys.readouterr().err == f"stonechat {words[0]}: none.x: No such file or directory\n"


NOT_ON_A_DEVICE = ",".join(name for name in console.EXTRAS if name not in ("paho", "stonechat_tools"))


def test_doctor_and_top_print_plain_text_without_rich() -> None:
    done = without(NOT_ON_A_DEVICE, "doctor")
    assert done.stderr == "" and done.stdout.startswith("features") and "linux-proc-1" in done.stdout
    with_rich = subprocess.run(
        [sys.executable, "-m", "stonechat_tools.cli", "doctor"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == with_rich.returncode and "━" in with_rich.stdout and "━" not in done.stdout
    done = without(NOT_ON_A_DEVICE, "top", "--once", "--no-model", "--interval", "0.2", "--collector", "proc")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("stonechat top  linux-proc-1") and any(line.startswith("cpu_busy") for line in lines)


def test_record_works_without_numpy_and_rich(tmp_path: Path) -> None:
    trace = tmp_path / "a.csv.gz"
    arguments = ("record", str(trace), "--window", "0.1", "--collector", "proc", "--windows")
    done = without(NOT_ON_A_DEVICE, *arguments, "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 windows" in done.stdout and trace.stat().st_size > 100
    done = without(NOT_ON_A_DEVICE, *arguments, "4", "--resume")
    assert done.returncode == 0 and "4 windows" in done.stdout, done.stderr


def test_the_laboratory_is_named_by_its_own_extra() -> None:
    done = without("stonechat_tools.lab", "demo", "--help")
    assert done.returncode == 1 and "needs stonechat-lab" in done.stderr and "'stonechat[lab]'" in done.stderr


def test_a_fault_of_ours_is_not_taken_for_a_missing_package() -> None:
    assert console.needs(ModuleNotFoundError("No module named 'zzz'", name="zzz")) is None


def third_party() -> set[str]:
    found = set()
    for path in TOOLS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"stonechat", "stonechat_tools"}


def test_every_package_that_a_tool_imports_has_an_extra() -> None:
    unknown = third_party() - set(console.EXTRAS) - ASKED_FOR_BY_NAME
    local = {path.stem for path in ROOT.joinpath("firmware_tests").glob("*")}
    assert unknown - local == set()


def test_every_extra_that_is_named_exists() -> None:
    assert set(console.EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


def test_a_plain_table_keeps_its_columns() -> None:
    text = console.plain_table(["a", "longer"], [["x\ny", "1"], ["zzzz", "2"]])
    assert text == "a     longer\nx     1\ny\nzzzz  2\n"


def test_an_account_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr(console.getpass, "getuser", nobody)
    assert console.user_name() == f"uid {os.getuid()}"


def test_the_command_for_a_missing_package_is_written_in_one_place() -> None:
    """So that each such line names this interpreter, a real extra, and what works in a clone."""
    package = Path(console.__file__).parent
    copies = [
        path.name
        for path in package.rglob("*.py")
        if path.name != "console.py" and re.search(r"pip install ['\"]stonechat", path.read_text())
    ]
    assert not copies


@pytest.mark.parametrize("by", ["replacing", "write_atomic"])
@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe", "socket", "folder"])
def test_what_is_no_file_is_never_replaced_by_one(tmp_path: Path, by: str, kind: str) -> None:
    """`-o /dev/null` by root would take it away from the whole machine."""
    place = tmp_path / "place"
    if kind == "device" and os.geteuid():
        pytest.skip("only root makes devices")
    if kind == "device":
        os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "link to a device":
        place.symlink_to("/dev/null")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(place))
    else:
        place.mkdir()
    before = place.lstat().st_ino
    with pytest.raises(OSError, match="not a regular file"):
        if by == "replacing":
            with console.replacing(place) as temporary:
                Path(temporary).write_text("x")
        else:
            console.write_atomic(place, b"x")
    assert place.lstat().st_ino == before and os.listdir(tmp_path) == ["place"]
