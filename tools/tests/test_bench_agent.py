"""What the whole agent takes: budgets of resident memory, by `stonechat bench agent`'s own measurement."""

import os
import socket
from pathlib import Path

import pytest
from bpf_support import needs_bpf
from fleet_support import needs_mosquitto
from stonechat_tools.bench.agent import TRANSPORTS, measure

MODELS = Path(__file__).resolve().parents[2] / "models"


@needs_mosquitto
@needs_bpf
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to attach BPF")
@pytest.mark.parametrize(("what", "most_mb"), [("no transport", 16), ("auto", 17), ("auto, TLS", 22)])
def test_resident_memory_with_bpf(what: str, most_mb: int) -> None:
    transport, auth = TRANSPORTS[what]
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(2000):  # connections in TIME_WAIT: a busy machine's table costs the agent nothing
            with socket.create_connection(server.getsockname()):
                server.accept()[0].close()
    rss_kib = measure(MODELS / "linux-1" / "model.tflite", True, transport, auth, 0.5)["rss_kib"]
    assert 5_000 < rss_kib <= most_mb * 1_000_000 // 1024
