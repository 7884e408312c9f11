"""Scenarios that need a mount and a network namespace of their own: run under `unshare --mount --net` as root."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from agent_process import DEVICE, AgentProcess, quick_model, wait_for
from stonechat_tools.fleet import keyring
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.local_broker import LocalBroker
from stonechat_tools.fleet.store import Store


def loopback(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


def missing(store: Store) -> set[int]:
    sequences = store.sequences(DEVICE)
    return set(range(min(sequences), max(sequences) + 1)) - set(sequences)


def full_disk(folder: Path) -> None:
    """State and outbox on a medium that fills up: the agent says so, reports go out from RAM, nothing is corrupt."""
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0777", "none", str(small)], check=True)
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, outbox_dir=str(small / "outbox"))
        keys = keyring.Keys({DEVICE: agent.secret})
        with Collector(store, keys, host="127.0.0.1", port=broker.port, prefix="stonechat/1/fleet"), agent:
            wait_for(lambda: store.count() >= 3, say=agent.said)
            filler = small / "filler"
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 512)
            before = store.count()
            wait_for(lambda: store.count() >= before + 12, say=agent.said)
            filler.unlink()
            before = store.count()
            wait_for(lambda: store.count() >= before + 3, say=agent.said)
        sequences = store.sequences(DEVICE)
        assert len(sequences) == len(set(sequences))
    assert "Traceback" not in agent.said(), agent.said()


def read_only_at_the_start(folder: Path) -> None:
    """State and outbox can't even be made: the agent reports from memory, and writes once the medium lets it."""
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0777", "none", str(small)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, outbox_dir=str(small / "outbox"), state=str(small / "st" / "state"))
        keys = keyring.Keys({DEVICE: agent.secret})
        with Collector(store, keys, host="127.0.0.1", port=broker.port, prefix="stonechat/1/fleet"), agent:
            wait_for(lambda: store.count() >= 6, say=agent.said)
            assert "Read-only file system" in agent.said(), agent.said()
            subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
            wait_for(lambda: "outbox: works again" in agent.said(), 60, say=agent.said)
            assert list((small / "outbox").glob("*.seg"))
            before = store.count()
            wait_for(lambda: store.count() >= before + 3, say=agent.said)
    said = agent.said()
    assert said.count("warning: outbox") == 1 and "Traceback" not in said, said


def network_pulled(folder: Path) -> None:
    """The network goes and comes back: every report of the time between arrives, once."""
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        keys = keyring.Keys({DEVICE: agent.secret})
        with Collector(store, keys, host="127.0.0.1", port=broker.port, prefix="stonechat/1/fleet"), agent:
            wait_for(lambda: store.count() >= 3, say=agent.said)
            loopback("down")
            time.sleep(12)  # more than twice the keep-alive: the broker has given the agent up
            before = store.count()
            loopback("up")
            wait_for(lambda: store.count() >= before + 20 and not missing(store), 150, say=agent.said)
    assert "Traceback" not in agent.said(), agent.said()


if __name__ == "__main__":
    loopback("up")
    quick_model(Path(sys.argv[2]) / "model.tflite")
    scenarios = {one.__name__: one for one in (full_disk, read_only_at_the_start, network_pulled)}
    scenarios[sys.argv[1]](Path(sys.argv[2]))
