"""What the whole agent takes: budgets of resident memory, by `stonechat bench agent`'s own measurement."""

import os
from pathlib import Path

import pytest
from fleet_support import needs_mosquitto
from stonechat_tools.bench.agent import TRANSPORTS, measure
from test_linux_bpf import needs_bpf

MODELS = Path(__file__).resolve().parents[2] / "models"


@needs_mosquitto
@needs_bpf
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to attach BPF")
@pytest.mark.parametrize(("what", "most_mb"), [("no transport", 16), ("auto", 17), ("auto, TLS", 22)])
def test_resident_memory_with_bpf(what: str, most_mb: int) -> None:
    transport, auth = TRANSPORTS[what]
    figures = measure(MODELS / "linux-1" / "model.tflite", True, transport, auth, 0.5)
    assert 5_000 < figures["rss_kib"] <= most_mb * 1_000_000 // 1024
