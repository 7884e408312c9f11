"""The daemon on this machine's real counters, with a real broker and a real collector."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stonechat
from agent_process import DEVICE, WINDOW_MS, AgentProcess, is_root, open_the_way, quick_model, wait_for
from stonechat import model_file
from stonechat.features import RATE
from stonechat.linux.planned_sleep import Announcements
from stonechat.model import END_BYTES
from stonechat.schema import Schema
from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.local_broker import LocalBroker, free_port
from stonechat_tools.fleet.store import Store

HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    open_the_way(tmp_path)
    quick_model(tmp_path / "model.tflite")
    return tmp_path


def collector_for(agent: AgentProcess, store: Store, port: int) -> Collector:
    keys = keyring.Keys({DEVICE: agent.secret})
    return Collector(store, keys, host="127.0.0.1", port=port, prefix="stonechat/1/fleet")


def missing(store: Store) -> set[int]:
    sequences = store.sequences(DEVICE)
    return set(range(min(sequences), max(sequences) + 1)) - set(sequences)


@pytest.mark.parametrize("transport", ["paho", "auto"])
def test_every_window_reaches_the_database_once(folder: Path, transport: str) -> None:
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, transport=transport)
        with collector_for(agent, store, broker.port), agent:
            wait_for(lambda: store.count() >= 6, say=agent.said)
            assert agent.stop() == 0
        sequences = store.sequences(DEVICE)
        assert len(sequences) == len(set(sequences))
    assert "connected to" in agent.said()
    assert "reports published" in agent.said().splitlines()[-1]
    assert "Traceback" not in agent.said()


@pytest.mark.slow(16)
def test_the_status_announces_heartbeat_and_sleep(folder: Path) -> None:
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        collector = collector_for(agent, store, broker.port)
        statuses: list[wire.Status] = []
        collector.on_status = statuses.append
        with collector, agent:
            wait_for(lambda: store.count() >= 2, say=agent.said)
            line = [*agent.command, "--announce-sleep", "3600"]
            done = subprocess.run(line, timeout=30, check=False, umask=0o077)  # root's, as hardened systems have it
            assert done.returncode == 0, agent.said()
            wait_for(lambda: any(status.sleep_s == 3600 for status in statuses), say=agent.said)
            assert {status.heartbeat_s for status in statuses if status.online} <= {0, 1}  # one window of 400 ms
            refused = subprocess.run([*agent.command, "--announce-sleep", "0"], capture_output=True, timeout=30)
            assert refused.returncode == 1 and refused.stderr.count(b"\n") == 1
        nobody = subprocess.run([*agent.command, "--announce-sleep", "60"], capture_output=True, text=True, timeout=60)
        assert nobody.returncode == 1 and "no agent runs with this configuration" in nobody.stderr
        assert not (folder / "state" / "state.sleep").exists()


def test_a_sleep_whose_connection_breaks_is_announced_again(tmp_path: Path) -> None:
    """What was on its way over a connection that is gone does not count: the machine would sleep unannounced."""

    class Link:
        connected, in_flight = True, [1]

        def __init__(self) -> None:
            self.announced: list[int] = []

        def announce_sleep(self, seconds: int) -> bool:
            self.announced.append(seconds)
            return True

    link: Any = Link()
    path = tmp_path / "state.sleep"
    sleep = Announcements(str(tmp_path / "state"))
    path.touch()
    sleep.turn(link, link)
    assert path.exists() and not link.announced  # it is being written
    path.write_text("60\n")
    sleep.turn(link, link)
    link.connected, link.in_flight = False, []  # a client forgets what was on its way
    sleep.turn(link, link)
    assert path.exists()
    link.connected = True
    sleep.connected()
    sleep.turn(link, link)
    sleep.turn(link, link)
    assert link.announced == [60, 60] and not path.exists()


def test_an_interrupted_announcement_leaves_nothing_behind(tmp_path: Path) -> None:
    """An agent that starts later would announce a sleep that nobody plans any more."""
    code = "import sys; from stonechat.linux.planned_sleep import announce; announce(sys.argv[1], 60)"
    line = [sys.executable, "-c", code, str(tmp_path / "state")]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "state.sleep").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) and not (tmp_path / "state.sleep").exists()


def test_a_killed_broker_loses_nothing(folder: Path) -> None:
    broker = LocalBroker().start()
    try:
        with Store(folder / "fleet.db") as store:
            agent = AgentProcess(folder, broker.port)
            with collector_for(agent, store, broker.port) as collector, agent:
                wait_for(lambda: store.count() >= 3, say=agent.said)
                broker.kill()
                before = store.count()
                time.sleep(5 * WINDOW_MS / 1000)
                broker.start()
                # What the broker acknowledged and then forgot comes again when the collector's word has not come.
                wait_for(
                    lambda: store.count() >= before + 6 and not missing(store),
                    90,
                    say=lambda: (agent.said(), collector.counts, missing(store), sorted(os.listdir(folder / "outbox"))),
                )
        assert "Traceback" not in agent.said()
    finally:
        broker.stop()


@pytest.mark.root
@pytest.mark.skipif(not is_root(), reason="needs root")
def test_nothing_is_imported_after_the_change_of_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package lies where only root may read; the product's counters need the modules that others don't."""
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(Path(stonechat.__file__).parent, closed / "stonechat", ignore=shutil.ignore_patterns("models"))
    monkeypatch.setenv("PYTHONPATH", str(closed))
    (folder / "openings").write_text("7\n")
    quick_model(folder / "door.tflite", Schema("door-1", (("openings", "1", RATE),)))
    row = f'{{name = "openings", unit = "1", kind = "rate", path = "{folder}/openings"}}'
    more = f'[counters]\nschema = "door-1"\nmodel = "{folder}/door.tflite"\nlist = [{row}]\n'
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, more=more)
        with collector_for(agent, store, broker.port), agent:
            wait_for(lambda: store.count() >= 3, say=agent.said)
        assert "ModuleNotFoundError" not in agent.said() and "Traceback" not in agent.said()


def test_a_restart_goes_on_with_what_was_learned(folder: Path) -> None:
    quick_model(folder / "model.tflite", learn_windows=4)
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        with collector_for(agent, store, broker.port):
            with agent:
                wait_for(lambda: store.count() >= 6, say=agent.said)
            assert "learning" in agent.said()
            first = max(store.sequences(DEVICE))
            agent.log.unlink()
            with agent:
                wait_for(lambda: max(store.sequences(DEVICE)) >= first + 3, say=agent.said)
            assert "watching" in agent.said() and "learning" not in agent.said()
        assert all(row.level == 0 for row in store.history(DEVICE)), "a restart looked like an attack"


def other_plan(path: Path) -> None:
    """A bias of the plan is not the graph's, and the checksum holds."""
    data = bytearray(path.read_bytes())
    data[len(data) - END_BYTES - model_file.sizes(data)[1] + 32] ^= 1
    path.write_bytes(model_file.seal(bytes(data)))


def other_host(path: Path) -> None:
    path.write_text(path.read_text().replace("127.0.0.1", "broker..lan"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "stonechat.toml").write_text("[device\n"), "is not TOML"),
        (lambda folder: (folder / "model.tflite").unlink(), "No such file"),
        (lambda folder: (folder / "model.tflite").write_bytes(b"not a model at all"), "[model] file"),
        (
            lambda folder: (folder / "model.tflite").write_bytes((folder / "model.tflite").read_bytes()[:-700]),
            "[model] file",
        ),
        (lambda folder: other_plan(folder / "model.tflite"), "not that of the graph"),
        (lambda folder: quick_model(folder / "model.tflite", Schema("fridge-1", (("a", "1", RATE),) * 8)), "fridge-1"),
        (lambda folder: (folder / "device.key").chmod(0o644), "chmod 600"),
        (lambda folder: (folder / "device.key").write_text("abc\n"), "64 hexadecimal digits"),
        (lambda folder: (folder / "device.key").unlink(), "key_file"),
        (lambda folder: other_host(folder / "stonechat.toml"), "[mqtt] host must be a name"),
    ],
    ids=[
        "toml",
        "no model",
        "no tflite",
        "truncated",
        "other plan",
        "other schema",
        "open key",
        "short key",
        "no key",
        "host",
    ],
)
def test_what_can_not_run_says_why_in_one_line(folder: Path, spoil: object, says: str) -> None:
    agent = AgentProcess(folder, 1)
    spoil(folder)  # type: ignore[operator]
    done = agent.run_to_end()
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_broker_at_all_is_said_once_and_windows_go_on(folder: Path) -> None:
    agent = AgentProcess(folder, free_port())
    with agent:
        time.sleep(3)
        assert agent.stop() == 0
    lines = agent.said().splitlines()
    assert len(lines) < 8, agent.said()
    assert "stopped after" in lines[-1]
    assert not lines[-1].startswith("stopped after 0 windows")


def test_check_says_what_would_run(folder: Path) -> None:
    agent = AgentProcess(folder, 1)
    done = subprocess.run([*agent.command, "--check"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "linux-proc-1" in done.stdout
    assert "/proc/net/dev" in done.stdout


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_check_names_a_state_folder_that_can_not_be_written(folder: Path, below: str) -> None:
    (folder / "file").write_text("")
    agent = AgentProcess(folder, 1, state=f"{folder}/{below}/state")
    done = subprocess.run([*agent.command, "--check"], capture_output=True, text=True, timeout=30)
    assert f"{folder}/file is not a folder; until then nothing that is learned outlives the agent" in done.stdout


def test_the_products_own_counters_are_scored_beside_the_devices(folder: Path) -> None:
    door = folder / "openings"
    door.write_text("7\n")
    columns = (("openings", "1", RATE), ("locked", "1", RATE))
    quick_model(folder / "door.tflite", Schema("door-1", columns))
    more = f"""[counters]
schema = "door-1"
model = "{folder}/door.tflite"
list = [{{name = "openings", unit = "1", kind = "rate", path = "{door}"}},
        {{name = "locked", unit = "1", kind = "rate", path = "{door}"}}]
"""
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, more=more)
        with collector_for(agent, store, broker.port), agent:
            wait_for(lambda: store.count() >= 4, say=agent.said)
        assert "Traceback" not in agent.said()
    missing_model = AgentProcess(folder, 1, more=more.replace("door.tflite", "absent.tflite")).run_to_end()
    assert missing_model.returncode == 1 and "[counters] model" in missing_model.stderr
    other_schema = AgentProcess(folder, 1, more=more.replace('"locked"', '"opened"')).run_to_end()
    assert other_schema.returncode == 1 and "schema" in other_schema.stderr


@pytest.mark.slow(20)
@pytest.mark.root
@pytest.mark.skipif(not is_root(), reason="needs root for a file system of its own")
@pytest.mark.parametrize("scenario", ["full_disk", "read_only_at_the_start", "network_pulled"])
def test_in_a_namespace_of_its_own(folder: Path, scenario: str) -> None:
    command = ["unshare", "--mount", "--net", sys.executable, str(HERE / "daemon_scenarios.py"), scenario, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
