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
    # Beside other tests a start keeps up to 2.6 MB more, now and then; alone it does not. The least of some is judged.
    seen: list[float] = []
    while not seen or min(seen) > most_mb * 1_000_000 // 1024 and len(seen) < 6:
        seen.append(measure(MODELS / "linux-1" / "model.tflite", True, transport, auth, 0.5)["rss_kib"])
    assert 5_000 < min(seen) <= most_mb * 1_000_000 // 1024, seen
