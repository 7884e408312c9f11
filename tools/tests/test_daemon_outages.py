"""Outages of the broker, its name and the way to it: detection goes on, and both transports behave alike."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import agent_process
import pytest
from agent_process import is_root, quick_model
from stonechat_tools.proofs.outages import TRANSPORTS, Trial, trial

AGENT = [str(Path(sys.executable).parent / "stonechat-agent")]
WINDOW_MS = 1000  # a busy machine, which stalls for less than half of that, costs none
SECONDS = 16.0  # longer than one attempt to connect, with the pause before it
PAIRS = [
    (outage, transport)
    for outage in ("silent-resolver", "dead-addresses", "silent-tls", "silent-broker", "refused")
    for transport in TRANSPORTS
]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not is_root() or not shutil.which("unshare"), reason="needs root for namespaces of its own"),
]


@pytest.fixture(scope="module")
def trials() -> Iterator[dict[tuple[str, str], Trial]]:
    """All at once: each one waits nearly all of the time."""
    with tempfile.TemporaryDirectory(prefix="stonechat-outages-") as folder, ThreadPoolExecutor(len(PAIRS)) as pool:
        Path(folder).chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent_process, "WINDOW_MS", WINDOW_MS)
            model = quick_model(Path(folder) / "model.tflite")
        started = {pair: pool.submit(trial, *pair, model, WINDOW_MS / 1000, SECONDS, AGENT) for pair in PAIRS}
        yield {pair: future.result() for pair, future in started.items()}


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_every_window_is_scored(trials: dict[tuple[str, str], Trial], pair: tuple[str, str]) -> None:
    one = trials[pair]
    assert one.holds, (one.windows, one.possible, one.log)
    assert one.stop_s < 15, "stopping waited for the network"
    assert "Traceback" not in one.log
    broker = [line for line in one.log.splitlines() if "broker" in line]
    assert len(broker) == len(set(broker)), "a cause is logged once: " + one.log


def test_both_transports_use_the_same_words(trials: dict[tuple[str, str], Trial]) -> None:
    for outage in ("silent-tls", "silent-broker", "refused"):
        words = [{line for line in trials[outage, way].log.splitlines() if "broker" in line} for way in TRANSPORTS]
        assert words[0] == words[1] != set(), outage
