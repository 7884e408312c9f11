"""What the distributions hold: nothing that attacks in what a device installs, nothing forgotten, one version."""

import ast
import importlib.resources
import tomllib
from pathlib import Path

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config, shipped
from stonechat_tools import console

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "stonechat_tools"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAB = tomllib.loads((ROOT / "tools/stonechat-lab/pyproject.toml").read_text())


def lab_modules() -> set[Path]:
    found = set()
    for pattern in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]:
        for path in ROOT.glob(pattern):
            found |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return {path for path in found if path.is_relative_to(TOOLS)}


def test_what_one_wheel_leaves_out_the_other_holds() -> None:
    held = set()
    for source in LAB["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]:
        path = (ROOT / "tools/stonechat-lab" / source).resolve()
        assert path.exists(), source
        held |= set(path.rglob("*.py")) if path.is_dir() else {path}
    assert held == lab_modules() and len(held) > 20


def imports_at_the_top(path: Path) -> set[str]:
    """Modules of the tools that `path` imports when it is imported itself."""
    found = set()
    package = ["stonechat_tools", *path.relative_to(TOOLS).parent.parts]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def test_no_module_of_the_device_and_the_tools_needs_the_laboratory_at_its_top() -> None:
    lab = lab_modules()
    names = {".".join(["stonechat_tools", *path.relative_to(TOOLS).with_suffix("").parts]) for path in lab}
    wings = {name.removesuffix(".__init__") for name in names}
    wrong = {}
    for path in TOOLS.rglob("*.py"):
        if path not in lab and (needed := imports_at_the_top(path) & wings):
            wrong[str(path.relative_to(TOOLS))] = needed
    assert wrong == {}


def test_the_version_is_written_once() -> None:
    import stonechat

    assert "version" in PROJECT["project"]["dynamic"] and "version" in LAB["project"]["dynamic"]
    for path in ("pyproject.toml", "tools/stonechat-lab/pyproject.toml"):
        assert f'"{stonechat.__version__}"' not in (ROOT / path).read_text()


@pytest.mark.parametrize("package", ["agent/stonechat", "tools/stonechat_tools"])
def test_nothing_climbs_out_of_its_package(package: str) -> None:
    folder = ROOT / package
    climbing = []
    for path in folder.rglob("*.py"):
        within = len(path.relative_to(folder).parts) - 1  # parents[within] is the package itself
        for node in ast.walk(ast.parse(path.read_text())):
            parent = node.value if isinstance(node, ast.Subscript) else None
            if isinstance(parent, ast.Attribute) and parent.attr == "parents":
                index = node.slice.value if isinstance(node.slice, ast.Constant) else within + 1
                if index > within:
                    climbing.append(f"{path.relative_to(folder)}:{node.lineno}")
    assert climbing == []


# --- models by name ---------------------------------------------------------------------------------------------------


def test_every_model_is_shipped_with_its_card_and_golden_vectors() -> None:
    assert shipped.names() == sorted(path.parent.name for path in (ROOT / "models").glob("*/model.tflite"))
    for name in shipped.names():
        for file in ("card.md", "golden.json"):
            assert Path(shipped.FOLDER, name, file).is_file(), f"{name}/{file}"


@pytest.mark.parametrize("name", ["stonechat.cddl", "linux/stonechat-agent.service", "models/linux-1/model.tflite"])
def test_package_data_is_reached_as_resources(name: str) -> None:
    assert importlib.resources.files("stonechat").joinpath(name).read_bytes()


def test_a_name_is_taken_where_a_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.path("linux-1") == f"{shipped.FOLDER}/linux-1/model.tflite"
    assert console.model_path("linux-1").read_bytes()[4:8] == b"TFL3"
    for text in ("linux-7", "./linux-1", "/linux-1", "", "..", "../linux-1", "linux-1/model.tflite", "report"):
        assert shipped.path(text) == text
    Path("linux-1").write_bytes(b"a file of that name wins")
    assert shipped.path("linux-1") == "linux-1"


MINIMAL = '[device]\nid = "a"\nkey_file = "k"\n[mqtt]\nhost = "h"\n[model]\nfile = "%s"\n'


def test_the_agents_configuration_takes_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.toml"
    file.write_text(MINIMAL % "linux-proc-1")
    assert config.load(str(file))["model"]["file"] == shipped.path("linux-proc-1")
    file.write_text(MINIMAL % "linux-9")
    with pytest.raises(ConfigError, match=r"linux-9: no such file; models of the package: linux-1, "):
        config.load(str(file))
    file.write_text(MINIMAL % "/etc/stonechat/model.tflite")
    assert config.load(str(file))["model"]["file"] == "/etc/stonechat/model.tflite"


def test_outside_a_working_copy_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert console.working_copy() == ROOT  # the editable installation lies in it
    monkeypatch.setattr(console, "__file__", str(tmp_path / "console.py"))
    with pytest.raises(ConfigError, match="needs a working copy"):
        console.working_copy()
