"""What `provision add --board` makes: its modes and contents, and a board that reports with it to a real collector."""

import contextlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fleet_support import Mosquitto, free_port, needs_mosquitto, wait_for
from stonechat.board import full
from stonechat.errors import ConfigError
from stonechat_tools import board_files, cli
from stonechat_tools.device.build import build
from stonechat_tools.fleet import broker_config, provision
from stonechat_tools.fleet.store import Store

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))

from targets import unix_i386  # noqa: E402

ACCOUNT = "root" if os.geteuid() == 0 else "mosquitto"
MAIN = """
import time
from stonechat.board import hooks

hooks.install()
from stonechat.board import ENTRY
from stonechat_device import device

watch = ENTRY.start(**device, firmware="1.4.2")
while True:
    watch.tick()
    time.sleep_ms(20)
"""


def made(folder: Path, auth: str, port: int = 8883) -> provision.Fleet:
    fleet = provision.Fleet.init(folder, provision.Settings("localhost", port, auth=auth, fleet="west", prefix="v/1"))
    fleet.add("sensor-7", board=True)
    return fleet


def arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The module, read as a board would."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec((folder / board_files.MODULE).read_text(), names)
    device = names["device"]
    assert isinstance(device, dict)
    return device


@pytest.mark.parametrize("auth", provision.AUTHS)
def test_start_takes_what_is_made(auth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = made(tmp_path / "f", auth)
    place = fleet.folder / "devices/sensor-7/board"
    assert place.stat().st_mode & 0o777 == 0o700
    for path in place.iterdir():
        assert path.stat().st_mode & 0o777 == (0o644 if path.name in PUBLIC else 0o600), path
    device = arguments(place, monkeypatch)
    inspect.signature(full.start).bind(**device)  # raises TypeError for one that start() has not
    assert device["key"] == fleet.secrets("sensor-7")[0]
    assert (device["fleet"], device["prefix"]) == ("west", "v/1")
    assert ("host" in device) is (auth != "managed")
    assert ("tls" in device) is (auth in ("mtls", "passwords"))
    assert ("password" in device) is (auth == "passwords")
    assert len(list(place.iterdir())) == {"mtls": 4, "passwords": 2, "managed": 1, "plain": 1}[auth]


PUBLIC = ("stonechat-ca.der", "stonechat-client.der")


def test_rotation_renews_them_and_revocation_removes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = made(tmp_path / "f", "mtls")
    place = fleet.folder / "devices/sensor-7/board"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    fleet.rotate("sensor-7")
    after = {path.name: path.read_bytes() for path in place.iterdir()}
    assert {name for name in before if before[name] != after[name]} == set(before) - {"stonechat-ca.der"}
    assert arguments(place, monkeypatch)["key"] == fleet.secrets("sensor-7")[0]
    fleet.revoke("sensor-7")
    assert not place.exists()


def test_a_device_without_a_board_gets_them_at_its_rotation(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("localhost", 1, auth="plain"))
    place = fleet.add("pump-1") / "board"
    assert not place.exists()
    fleet.rotate("pump-1", board=True)
    assert (place / board_files.MODULE).exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    fleet = made(tmp_path / "f", "plain")
    place = fleet.folder / "devices/sensor-7/board"
    shutil.rmtree(place)
    place.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is a link"):
        fleet.rotate("sensor-7")
    assert not (tmp_path / board_files.MODULE).exists()


def test_the_steps_are_printed_and_no_secret_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(tmp_path / "f")
    assert cli.main(["provision", "--dir", base, "init", "--broker", "h", "--auth", "passwords"]) == 0
    assert cli.main(["provision", "--dir", base, "add", "sensor-7", "--board"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"stonechat deploy --port PORT --model micropython-1 --hook --identity {base}/devices/sensor-7/board" in printed
    )
    assert cli.main(["provision", "--dir", base, "add", "sensor-8", "--board", "--model", "linux-1"]) == 0
    own = f"{base}/devices/sensor-8"
    assert f"--model {own}/model.tflite --hook --identity {own}/board" in capsys.readouterr().out
    assert cli.main(["provision", "--dir", base, "rotate", "sensor-8"]) == 0
    assert f"--model {own}/model.tflite --hook" in capsys.readouterr().out
    assert "600 stonechat_device.py" in printed and "644 stonechat-ca.der" in printed
    text = (tmp_path / "f/devices/sensor-7/board" / board_files.MODULE).read_text()
    for secret in ((tmp_path / "f/secrets/sensor-7.key").read_text().strip(),):
        assert secret in text and secret not in printed


def test_deploy_names_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["deploy", "--port", "/dev/none", "--arch", "armv6m", "--dry-run", "--identity"]
    assert cli.main([*words, str(tmp_path)]) == 1
    assert f"{tmp_path}: no stonechat_device.py there" in capsys.readouterr().err
    made(tmp_path / "f", "mtls")
    assert cli.main([*words, str(tmp_path / "f/devices/sensor-7/board"), "--profile", "core"]) == 0
    printed = capsys.readouterr().out
    for name in board_files.MODES:
        assert f":/{name}" in printed
    assert "stonechat/board/tls.mpy" in printed


@needs_mosquitto
@pytest.mark.slow(8)
@pytest.mark.parametrize(("auth", "entry"), [("mtls", "full"), ("passwords", "core")])
def test_a_board_reports_to_a_collector_with_them(auth: str, entry: str, tmp_path: Path) -> None:
    target = unix_i386()
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")
    port = free_port()
    fleet = made(tmp_path / "fleet", auth, port)
    conf = broker_config.write(fleet, "127.0.0.1", ["localhost", "127.0.0.1"], ACCOUNT)
    board = tmp_path / "board"
    build("x86", board, ["board/tls"], profile=entry)
    for path in board_files.read_board(fleet.folder / "devices/sensor-7/board"):
        shutil.copyfile(path, board / path.name)
    shutil.copyfile(ROOT / "models/micropython-1/model.tflite", board / "model.tflite")
    (board / "main.py").write_text(MAIN.replace("ENTRY", entry))
    database = tmp_path / "reports.db"
    account = fleet.folder / "collector"
    collect = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--keys", str(fleet.folder / "keys")]
    collect += ["--db", str(database), "--cafile", str(account / "ca.crt")]
    if auth == "mtls":
        collect += ["--cert", str(account / "client.crt"), "--key", str(account / "client.key")]
    else:
        collect += ["--user", "collector", "--password-file", str(account / "password")]
    with Mosquitto(conf, port), open(tmp_path / "log", "wb") as log:
        environment = {**os.environ, "MICROPYPATH": ".:.frozen"}
        processes = [
            subprocess.Popen(collect, stdout=log, stderr=log),
            subprocess.Popen([*target.command, "main.py"], cwd=board, env=environment, stdout=log, stderr=log),
        ]
        try:

            def heard() -> bool:
                assert all(process.poll() is None for process in processes), (tmp_path / "log").read_text()
                if not database.exists():
                    return False
                with contextlib.suppress(Exception), Store(database) as store:
                    return any(row["device"] == "sensor-7" and row["online"] for row in store.devices())
                return False

            assert wait_for(heard, 90), (tmp_path / "log").read_text()
        finally:
            for process in processes:
                process.kill()
                process.wait()
