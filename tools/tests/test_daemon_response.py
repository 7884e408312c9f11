"""The response and the user's switch on Linux: the real agent, a real broker, a real collector, the real packet
filter."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
from agent_process import DEVICE, WINDOW_MS, AgentProcess, is_root, wait_for
from stonechat.features import SHARE
from stonechat.linux import netfilter, nfnetlink
from stonechat.linux.allow_list import AllowList
from stonechat.linux.privileges import user_ids
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.linux.switch import Switch, distrust
from stonechat.policy import QUARANTINE
from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.local_broker import LocalBroker, mosquitto_path
from stonechat_tools.fleet.renewals import Renewals
from stonechat_tools.fleet.store import Store
from stonechat_tools.lab import spaces
from stonechat_tools.modeling.fit import fit
from test_daemon import collector_for, folder  # noqa: F401 - a fixture

needs_root = pytest.mark.skipif(not is_root(), reason="needs root: network namespaces and the packet filter")
BROKER, STRANGER, PORT = "10.88.0.1", "10.88.7.7", 1883
LEASE_S = 3


def nervous_model(path: Path) -> None:
    """A model of a machine unlike any: everything is an alarm within some windows."""
    rng = np.random.default_rng(0)
    middle = np.array([12_800 if kind == SHARE else 4_000 for _, _, kind in LINUX_PROC_1.columns])
    rows = np.rint(middle + rng.normal(size=(400, len(LINUX_PROC_1))) * 30).clip(0, 25_600)
    path.write_bytes(fit(rows, LINUX_PROC_1, WINDOW_MS, learn_windows=0).to_tflite("nervous", 1))


def switch_of(folder: Path) -> Path:  # noqa: F811
    place = folder / "switch"
    place.mkdir(mode=0o755)
    return place / "off"


def monitoring(path: Path) -> str:
    return f'[monitoring]\noff_file = "{path}"\n'


# --- the user's switch ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not is_root(), reason="needs root: the switch belongs to root")
def test_switched_off_only_keep_alive_leaves_and_nothing_is_read(folder: Path) -> None:  # noqa: F811
    path = switch_of(folder)
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, more=monitoring(path))
        statuses: list[wire.Status] = []
        collector = collector_for(agent, store, broker.port)
        collector.on_status = statuses.append
        with collector, agent:
            wait_for(lambda: store.count() >= 4, say=agent.said)
            path.touch()
            wait_for(lambda: any(status.off_for_s is not None for status in statuses), say=agent.said)
            reports = store.count()
            number = len(statuses)
            assert agent.process is not None
            calls = traced(agent.process.pid, 7.0, folder)
            assert (store.count(), len(statuses)) == (reports, number)
            sent = re.findall(r'(?:sendto|write|send)\(\d+<[^>]*>, "([^"]*)"', calls)
            assert sent and set(sent) == {r"\300\0"}, calls  # PINGREQ, each 5 s
            assert "/proc" not in calls and "/sys" not in calls, calls
            path.unlink()
            wait_for(lambda: store.count() >= reports + 4, say=agent.said)
            assert statuses[-1].off_for_s is None and not statuses[-1].learning
        assert "monitoring is off" in agent.said() and "monitoring is on again" in agent.said()


def test_started_while_switched_off_it_does_not_claim_to_watch(folder: Path) -> None:  # noqa: F811
    with LocalBroker() as broker:
        agent = AgentProcess(folder, broker.port, more="[monitoring]\non = false\n")
        with agent:
            wait_for(lambda: "connected to" in agent.said(), say=agent.said)
        assert "monitoring is off" in agent.said()
        assert "watching with" not in agent.said() and "learning what" not in agent.said()


def traced(pid: int, seconds: float, folder: Path) -> str:  # noqa: F811
    """The system calls of a process that read, open or send, with the paths behind the file descriptors."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    out = folder / "strace"
    names = "trace=open,openat,read,pread64,readv,recvfrom,recvmsg,write,send,sendto,sendmsg,bpf,ioctl,getdents64"
    tracer = subprocess.Popen(["strace", "-f", "-y", "-e", names, "-o", str(out), "-p", str(pid)])
    time.sleep(seconds)
    tracer.send_signal(signal.SIGINT)
    tracer.wait(10)
    return out.read_text()


class Ear:
    """Hears every message that a broker hands on."""

    def __init__(self, port: int) -> None:
        self.topics: list[str] = []
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self.client.on_message = lambda _client, _data, message: self.topics.append(message.topic)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.mark.slow(12)
@pytest.mark.skipif(not is_root(), reason="needs root: the switch belongs to root")
def test_the_switch_holds_across_restart_reload_and_an_outage_of_the_broker(folder: Path) -> None:  # noqa: F811
    path = switch_of(folder)
    path.touch()
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, more="[homeassistant]\ndiscovery = true\n" + monitoring(path))
        os.chown(agent.secret_file, *user_ids())  # so that the agent can read it again
        ear = Ear(broker.port)
        statuses: list[wire.Status] = []
        collector = collector_for(agent, store, broker.port)
        collector.on_status = statuses.append

        def off_statuses(more: int) -> None:
            number = len(statuses) + more
            wait_for(lambda: len(statuses) >= number and statuses[-1].off_for_s is not None, say=agent.said)

        try:
            with collector:
                with agent:  # started with the switch on
                    off_statuses(1)
                    assert agent.process is not None
                    time.sleep(1)  # SIGHUP is ignored until it runs
                    agent.process.send_signal(signal.SIGHUP)
                    wait_for(lambda: "read again" in agent.said(), say=agent.said)
                    off_statuses(1)
                    ear.client.publish("homeassistant/status", "online").wait_for_publish(5)
                    time.sleep(2)
                with agent:
                    off_statuses(1)
                assert {topic for topic in ear.topics if topic != "homeassistant/status"} == {
                    f"stonechat/1/fleet/{DEVICE}/status"
                }
                assert store.count() == 0
                with agent:
                    off_statuses(1)
                    broker.kill()
                    path.unlink()
                    wait_for(lambda: "monitoring is on again" in agent.said(), say=agent.said)
                    broker.start()
                    wait_for(lambda: store.count() >= 3, 60, say=agent.said)
                    wait_for(lambda: statuses[-1].off_for_s is None, say=agent.said)
                    broker.kill()
                    said = agent.said().count("monitoring is off")
                    time.sleep(1)
                    path.touch()
                    wait_for(lambda: agent.said().count("monitoring is off") > said, say=agent.said)
                    broker.start()
                    off_statuses(1)
                    reports = store.count()
                    time.sleep(2)
                    assert store.count() == reports  # those of the outage wait
                    path.unlink()
                    wait_for(lambda: store.count() > reports + 2, say=agent.said)
        finally:
            ear.close()


@pytest.mark.skipif(not is_root(), reason="needs root: files of other owners")
def test_a_file_that_others_could_have_made_is_no_switch(folder: Path) -> None:  # noqa: F811
    path = switch_of(folder)
    section = {"on": True, "off_file": str(path)}
    switch = Switch(section)
    assert not switch.off() and not switch.trouble
    path.touch(mode=0o644)
    assert switch.off()

    def refused(why: str) -> None:
        assert not switch.off() and why in switch.trouble, switch.trouble

    os.chown(path, 65534, -1)
    refused("belongs to user 65534")
    os.chown(path, 0, -1)
    path.chmod(0o666)
    refused("written by others")
    path.chmod(0o644)
    path.parent.chmod(0o1777)  # sticky: others can make the file there
    refused("written by others")
    path.parent.chmod(0o775)
    refused("written by others")
    path.parent.chmod(0o755)
    os.chown(path.parent, 65534, -1)
    refused("belongs to user 65534")
    os.chown(path.parent, 0, -1)
    real = path.with_name("real")
    path.rename(real)
    path.symlink_to(real)
    refused("is a link")
    path.unlink()
    path.mkdir()
    refused("is not a file")
    path.rmdir()
    real.rename(path)
    path.parent.chmod(0o700)
    os.seteuid(65534)
    try:
        refused("may not enter its folder")
    finally:
        os.seteuid(0)
    path.parent.chmod(0o755)
    linked = path.parent.with_name("linked")
    linked.symlink_to(path.parent)
    assert "is a link" in distrust(str(linked / "off"))
    assert switch.off()
    assert Switch({"on": False, "off_file": ""}).off() and not Switch({"on": True, "off_file": ""}).off()


@pytest.mark.skipif(not is_root(), reason="needs root: the switch belongs to root")
def test_what_is_no_switch_is_logged_and_monitoring_goes_on(folder: Path) -> None:  # noqa: F811
    path = switch_of(folder)
    path.parent.chmod(0o777)
    path.touch()
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, more=monitoring(path))
        with collector_for(agent, store, broker.port), agent:
            wait_for(lambda: store.count() >= 4, say=agent.said)
        assert (
            "written by others (mode 777); monitoring goes on" in agent.said()
            and "monitoring is off" not in agent.said()
        )


# --- the response -----------------------------------------------------------------------------------------------------


class Outside:
    """A device's namespace with the agent in it; outside: the broker, a collector, and a stranger that counts what
    reaches it."""

    def __init__(self, net: spaces.Pair, folder: Path, store: Store, more: str, renew: bool) -> None:  # noqa: F811
        self.net = net
        conf = folder / "mosquitto.conf"
        conf.write_text(f"listener {PORT} 0.0.0.0\nallow_anonymous true\npersistence false\nuser root\n")
        command = [str(mosquitto_path()), "-c", str(conf)]
        self.broker = net.outside.do(lambda: subprocess.Popen(command, stderr=subprocess.DEVNULL))
        self.agent = AgentProcess(folder, PORT, host=BROKER, more=more)
        keys = keyring.Keys({DEVICE: self.agent.secret})
        self.renewals = Renewals(store, keys) if renew else None
        self.collector = Collector(
            store, keys, host=BROKER, port=PORT, prefix="stonechat/1/fleet", renewals=self.renewals
        )
        self.stranger: socket.socket = net.outside.do(_bound)
        self.sender: socket.socket = net.device.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> "Outside":
        self.net.outside.do(self.collector.start)
        self.net.device.do(self.agent.start)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.agent.process is not None and self.agent.process.poll() is None:
                self.agent.stop()
        finally:
            self.collector.stop()
            self.broker.terminate()
            self.broker.wait(10)
            self.stranger.close()
            self.sender.close()

    @property
    def reached(self) -> bool:
        """Whether the stranger hears the device."""
        text = os.urandom(8)
        try:
            self.sender.sendto(text, (STRANGER, 9))
        except PermissionError:
            return False
        end_s = time.monotonic() + 0.3
        while time.monotonic() < end_s:
            try:
                if self.stranger.recv(64) == text:
                    return True
            except BlockingIOError:
                time.sleep(0.005)
        return False


def _bound() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((STRANGER, 9))
    made.setblocking(False)
    return made


def settings(mode: str, folder: Path) -> str:  # noqa: F811
    rules = f'[{{action = "quarantine", seconds = {LEASE_S}, most_seconds = {LEASE_S}}}, {{action = "hook"}}]'
    return f"""[response]
mode = "{mode}"
rules = {rules}
hook = ["{folder}/hook", "a b"]
"""


@pytest.fixture
def net() -> Iterator[spaces.Pair]:
    with spaces.pair() as made:
        yield made


@pytest.fixture
def nervous(folder: Path) -> Path:  # noqa: F811
    nervous_model(folder / "model.tflite")
    hook = folder / "hook"
    marks = folder / "marks"
    marks.mkdir()
    marks.chmod(0o777)
    hook.write_text(
        f'#!/bin/sh\necho "$1 $STONECHAT_DEVICE $STONECHAT_LEVEL" >> {marks}/called\nid -u >> {marks}/called\n'
    )
    hook.chmod(0o755)
    return folder


def lease_of(store: Store) -> dict[str, Any] | None:
    return next((entry for entry in store.decisions(DEVICE) if entry["lease"]), None)


@needs_root
@pytest.mark.slow(12)
def test_a_quarantine_ends_by_itself_and_lasts_while_the_collector_renews(net: spaces.Pair, nervous: Path) -> None:
    with Store(nervous / "fleet.db") as store, Outside(net, nervous, store, settings("on", nervous), True) as lab:
        wait_for(lambda: store.count() >= 2, say=lab.agent.said)
        assert lab.reached
        wait_for(lambda: not lab.reached, say=lab.agent.said)
        began_s = time.monotonic()
        assert lab.agent.process is not None
        status = Path(f"/proc/{lab.agent.process.pid}/status").read_text()
        assert re.search(r"CapEff:\s+0000000000001000\b", status) and re.search(r"CapPrm:\s+0000000000001000\b", status)
        while (
            time.monotonic() - began_s < 3 * LEASE_S
        ):  # renewed: without a gap, and the broker is reached all the while
            assert not lab.reached
        assert lab.renewals is not None and lab.renewals.sent >= 5
        reports = store.count()
        wait_for(lambda: store.count() >= reports + 2, say=lab.agent.said)
        entry = lease_of(store)
        assert entry is not None and entry["end_s"] is None and entry["done"]
        lab.collector.renewals = None  # the collector no longer renews
        stopped_s = time.monotonic()
        wait_for(lambda: lab.reached, say=lab.agent.said)
        assert time.monotonic() - stopped_s < LEASE_S + 1.5
        wait_for(lambda: (lease_of(store) or {}).get("end") == "expired", say=lab.agent.said)
        entry = lease_of(store)
        assert entry is not None and entry["renewals"] >= 5 and entry["stopped"] > 0
        called = (nervous / "marks/called").read_text().split("\n")
        assert called[0] == f"a b {DEVICE} alarm" and called[1] not in ("", "0")
        assert lab.reached  # the alarm goes on, and nothing begins again in it


@needs_root
@pytest.mark.slow(12)
def test_a_dry_run_harms_nothing_and_keeps_no_capability(net: spaces.Pair, nervous: Path) -> None:
    with Store(nervous / "fleet.db") as store, Outside(net, nervous, store, settings("dry-run", nervous), True) as lab:
        wait_for(lambda: (lease_of(store) or {}).get("end") == "expired", say=lab.agent.said)
        entry = lease_of(store)
        assert entry is not None and not entry["done"] and entry["text"].startswith("would have been: quarantine")
        assert lab.reached and lab.agent.process is not None
        status = Path(f"/proc/{lab.agent.process.pid}/status").read_text()
        assert re.search(r"CapEff:\s+0+\b", status)
        assert not (nervous / "marks/called").exists()
        assert "would quarantine for 3 s" in lab.agent.said()


@needs_root
@pytest.mark.parametrize("mode", ["off", "dry-run"])
def test_a_start_opens_whatever_its_mode_is(net: spaces.Pair, folder: Path, mode: str) -> None:  # noqa: F811
    agent = AgentProcess(folder, PORT, host=BROKER, more=f'[response]\nmode = "{mode}"\n')
    left = net.device.do(netfilter.Netfilter, AllowList(BROKER, PORT, []))
    net.device.do(left.apply, QUARANTINE, 600)
    net.device.do(left.detach)  # as the kernel does with a killed agent's socket

    def tables() -> bool:
        kernel = nfnetlink.NfTables()
        try:
            list(kernel.ask(nfnetlink.GET_TABLE, nfnetlink.INET, nfnetlink.text(1, "stonechat")))
            return True
        except FileNotFoundError:
            return False
        finally:
            kernel.close()

    assert net.device.do(tables)
    net.device.do(agent.start)
    try:
        wait_for(lambda: not net.device.do(tables), say=agent.said)
    finally:
        agent.stop()


@needs_root
@pytest.mark.slow(12)
def test_a_second_agent_leaves_the_first_one_s_quarantine(net: spaces.Pair, nervous: Path) -> None:
    more = settings("on", nervous).replace(f"seconds = {LEASE_S}", "seconds = 600")
    with Store(nervous / "fleet.db") as store, Outside(net, nervous, store, more, False) as lab:
        wait_for(lambda: not lab.reached, say=lab.agent.said)
        ended = net.device.do(lab.agent.run_to_end)  # on the same folders
        assert ended.returncode == 75 and "another stonechat-agent uses" in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
        assert not lab.reached
        other = nervous / "other"
        other.mkdir()
        shutil.copy(nervous / "model.tflite", other)
        second = AgentProcess(other, PORT, host=BROKER, more=more)
        net.device.do(second.start)
        try:
            wait_for(lambda: "another stonechat-agent responds in this network namespace" in second.said())
            wait_for(lambda: "response (dry run): would quarantine" in second.said(), say=second.said)
            assert not lab.reached
        finally:
            second.stop()
        checked = net.device.do(lambda: subprocess.run([*lab.agent.command, "--check"], capture_output=True, text=True))
        assert "response: on, nf_tables" in checked.stdout, checked  # it is what runs
        assert not lab.reached


@needs_root
def test_switching_off_opens(net: spaces.Pair, nervous: Path) -> None:
    path = switch_of(nervous)
    more = settings("on", nervous).replace(f"seconds = {LEASE_S}", "seconds = 600") + monitoring(path)
    with Store(nervous / "fleet.db") as store, Outside(net, nervous, store, more, False) as lab:
        wait_for(lambda: not lab.reached, say=lab.agent.said)
        path.touch()
        wait_for(lambda: lab.reached, 5, say=lab.agent.said)
