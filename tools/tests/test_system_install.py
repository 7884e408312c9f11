"""`stonechat-agent install` on a Debian that its own systemd boots: to the first report, through a reboot, and back."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian import Debian, why_not
from fleet_support import MOSQUITTO, free_port, needs_mosquitto
from stonechat_tools.console import model_path
from stonechat_tools.fleet import broker_config, provision
from stonechat_tools.fleet.bundle import make_bundle
from test_system_wheels import downloads, wheels  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    needs_mosquitto,
]
DEVICE = "sensor-7"
AGENT = "/opt/stonechat/bin/stonechat-agent"


class Fleet:
    """A broker with mutual TLS and `stonechat collect`, both real, on this machine's loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = free_port()
        settings = provision.Settings(broker="localhost", port=port)
        self.fleet = provision.Fleet.init(folder / "fleet", settings)
        self.fleet.add(DEVICE, model_path("linux-proc-1-demo"))  # windows of two seconds, at once
        config = self.fleet.folder / "devices" / DEVICE / "stonechat.toml"
        config.write_text(config.read_text() + "\n[report]\nheartbeat_windows = 1\n")
        self.bundle = self.fleet.bundle(DEVICE)
        provision.write_file(self.bundle, make_bundle(config.parent))
        conf = broker_config.write(self.fleet, "127.0.0.1", ["localhost"], "root")
        with open(folder / "broker.log", "wb") as log:
            self._broker = subprocess.Popen([str(MOSQUITTO), "-c", str(conf)], stdout=log, stderr=log)
        self._out = open(folder / "collect.jsonl", "wb")  # noqa: SIM115 - the collector writes to it
        where = self.fleet.folder
        command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--broker", f"localhost:{port}", "--json"]
        command += ["--keys", str(where / "keys"), "--cafile", str(where / "ca.crt"), "--db", str(folder / "fleet.db")]
        command += ["--cert", str(where / "collector/client.crt"), "--key", str(where / "collector/client.key")]
        self._collector = subprocess.Popen(command, stdout=self._out, stderr=subprocess.STDOUT)

    def reports(self) -> int:
        count = 0
        for line in (self.folder / "collect.jsonl").read_text().splitlines():
            count += f'"{DEVICE}"' in line and "score" in line and isinstance(json.loads(line), dict)
        return count

    def stop(self) -> None:
        for process in (self._collector, self._broker):
            process.terminate()
            process.wait(20)
        self._out.close()


@pytest.fixture(scope="module", params=["bookworm"])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    folder = tmp_path_factory.mktemp("debian")
    debian = Debian(request.param, folder)
    try:
        yield debian.start()
    finally:
        debian.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path)
    try:
        yield running
    finally:
        running.stop()


def test_from_a_wheel_to_a_report_through_a_reboot_and_back(
    machine: Debian,
    fleet: Fleet,
    wheels: Path,  # noqa: F811
) -> None:
    for folder in (wheels, downloads(Path(sys.executable), "3.11", wheels)):
        shutil.copytree(folder, machine.root / "root/wheels", dirs_exist_ok=True)
    pep_668 = machine.run("python3", "-m", "pip", "install", "stonechat[linux]")
    assert pep_668.returncode != 0  # no pip, or an environment that is managed by Debian: hence the next command
    machine.done("python3", "-m", "venv", "/opt/stonechat")
    pip = ("/opt/stonechat/bin/pip", "install", "-q", "--no-index", "--find-links", "/root/wheels")
    machine.done(*pip, "stonechat[linux]")
    bundle = f"/root/{DEVICE}.tar"
    shutil.copy2(fleet.bundle, machine.root / bundle[1:])

    before = machine.files()
    dry = machine.done(AGENT, "install", "--bundle", bundle, "--dry-run")
    assert "user stonechat" in dry and "device.key" in dry
    assert machine.files() == before

    said = machine.done(AGENT, "install", "--bundle", bundle)
    print(said)
    assert machine.done("systemctl", "is-active", "stonechat-agent") == "active\n"
    assert machine.done("systemctl", "is-enabled", "stonechat-agent") == "enabled\n"
    pid = machine.done("systemctl", "show", "--value", "--property=MainPID", "stonechat-agent").strip()
    facts = machine.done("cat", f"/proc/{pid}/status")
    user = machine.done("id", "-u", "stonechat").strip()
    assert facts.split("Uid:")[1].split()[:4] == [user] * 4
    assert int(facts.split("CapEff:")[1].split()[0], 16) == 0
    machine.wait_until(fleet.reports, "no report", 90)
    key = machine.root / "etc/stonechat/device.key"
    assert (oct(key.stat().st_mode), key.stat().st_uid) == ("0o100600", int(user))

    assert "nothing to do" in machine.done(AGENT, "install", "--bundle", bundle)
    machine.reboot()
    machine.wait_until(
        lambda: machine.run("systemctl", "is-active", "stonechat-agent").stdout == "active\n", "not active", 60
    )
    seen, until_s = fleet.reports(), time.monotonic() + 90
    machine.wait_until(lambda: fleet.reports() > seen or time.monotonic() > until_s, "no report after the reboot", 100)
    assert fleet.reports() > seen

    assert "keep /etc/stonechat/device.key" in machine.done(AGENT, "uninstall")
    assert machine.run("systemctl", "is-active", "stonechat-agent").stdout == "inactive\n"
    kept = {path for path in machine.files() if path not in before}
    assert {"/etc/stonechat/device.key", "/var/lib/stonechat/outbox"} <= kept
    assert not {path for path in kept if path.endswith((".toml", ".tflite", ".service"))}
    machine.done(AGENT, "uninstall")  # again: nothing is left to do
    machine.done(AGENT, "install", "--bundle", bundle)
    assert machine.done("systemctl", "is-active", "stonechat-agent") == "active\n"

    machine.done(AGENT, "uninstall", "--purge")
    assert "nothing to do" in machine.done(AGENT, "uninstall", "--purge")
    after = machine.files()
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()
    assert machine.run("id", "stonechat").returncode != 0
