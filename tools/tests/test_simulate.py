"""The simulated fleet: real agents, a real broker, a real collector that judges them."""

import json
import random
import time
from pathlib import Path

import pytest
from fleet_support import needs_mosquitto
from stonechat_tools import cli
from stonechat_tools.fleet import keyring
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.local_broker import LocalBroker
from stonechat_tools.fleet.monitor import Monitor
from stonechat_tools.fleet.store import Store
from stonechat_tools.simulate import simulate, windows


@needs_mosquitto
def test_an_outbreak_among_real_agents(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--devices", "40", "--attack", "mirai:20%", "--attack-after", "3", "--for", "16", "--speed", "20"]
    assert cli.main(["simulate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["connected"] == 40 and found["attacked"] == 8
    assert found["attacked that alarmed"] >= 7 and found["others that alarmed"] == 0
    assert found["seconds to the outbreak"] is not None and found["incidents"] == {"outbreak": 1}
    assert found["presence"] == {"reporting": 40} and found["reports stored"] > 100


@needs_mosquitto
def test_presence_of_real_agents_through_a_real_broker(tmp_path: Path) -> None:
    """One sleeps as announced, one dies without a goodbye, one goes on; two hold the same key."""
    model, schema = windows.read_model("micropython-1", 50)
    chance = random.Random(1)
    benign = windows.drawn(model, schema, chance, 300)
    learned = windows.learned_state(model, schema, benign, chance)
    names = ["awake", "asleep", "dead", "cloned"]
    secrets = {name: keyring.new_secret() for name in names}

    def device(name: str) -> simulate.Simulated:
        recorded = windows.endless(benign, chance)
        return simulate.Simulated(name, secrets[name], model, schema, recorded, learned, 5)

    with LocalBroker() as broker, Store(tmp_path / "fleet.db") as store:
        monitor = Monitor(store)
        keys = keyring.Keys(secrets)
        collector = Collector(store, keys, host="127.0.0.1", port=broker.port, monitor=monitor)
        with collector:
            assert collector.connected.wait(20)
            devices = [device(name) for name in names]
            for each in devices:
                each.connect("127.0.0.1", broker.port)

            def states() -> dict[str, str]:
                return {seen.device: seen.state.state for seen in monitor.states()}

            def live(until: dict[str, str], seconds: float = 40) -> bool:
                end_s = time.monotonic() + seconds
                while time.monotonic() < end_s:
                    for each in devices:
                        each.tick()
                    if until.items() <= states().items():
                        return True
                    time.sleep(0.02)
                return False

            assert live(dict.fromkeys(names, "reporting")), states()
            assert {seen.interval_s for seen in monitor.states()} <= {1.0}  # five windows of 0.2 s, as announced
            sleeper, dying = devices[1], devices[2]
            assert sleeper.agent.announce_sleep(3600)
            for _ in range(100):
                sleeper.client.poll(0.01)
            sleeper.close()
            dying.client._socket.shutdown(2)  # as a cable that is pulled, but the broker learns of it
            devices = [devices[0], devices[3]]
            assert live({"awake": "reporting", "asleep": "asleep", "dead": "gone"}), states()
            thief = device("cloned")
            thief.connect("127.0.0.1", broker.port)
            devices.append(thief)
            # one client id: the broker ends the other connection each time, and each comes back and says so
            assert live({"cloned": "lying"}, 60), [seen.state for seen in monitor.states()]
        held = {seen.device: seen.state.state for seen in Monitor(store).states()}
        assert held["asleep"] == "asleep" and held["cloned"] == "lying" and held["dead"] == "gone"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "0"], "from 1 to 5000"),
        (["--speed", "1000"], "from 1 to 100"),
        (["--attack", "mirai:500%"], "NAME:SHARE"),
        (["--attack", "virus:5%"], "there are exfiltration, flood, mirai"),
        (["--model", "none"], "shipped: linux-1"),
        (["--broker", "localhost"], "--keys-out"),
    ],
)
def test_wrong_arguments_cost_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *words]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_keys_are_never_in_a_file_that_others_may_read(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("as it was")
    (tmp_path / "sim-0000.key").write_text("old")
    (tmp_path / "sim-0000.key").chmod(0o644)
    (tmp_path / "sim-0001.key").symlink_to(elsewhere)
    simulate._write_keys(tmp_path, {f"sim-000{n}": bytes(32) for n in range(3)})
    assert [(tmp_path / f"sim-000{n}.key").lstat().st_mode & 0o177777 for n in range(3)] == [0o100600] * 3
    assert elsewhere.read_text() == "as it was"
