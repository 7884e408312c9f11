"""Every shipped model on devices that do nothing, something and much: after learning no window alarms. Either the
device is watched, or every verdict says that the model does not fit."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from stonechat.agent import Agent
from stonechat.board.schema import MICROPYTHON_1
from stonechat.delivery import Delivery
from stonechat.features import SHARE
from stonechat.linux.schemas import LINUX_1, LINUX_PROC_1, LINUX_SERVICE_1
from stonechat.model import load_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.replay import Replay
from stonechat.state import State

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.parent.name for path in ROOT.glob("models/*/model.tflite"))
SCHEMAS = {schema.id: schema for schema in (LINUX_1, LINUX_PROC_1, LINUX_SERVICE_1, MICROPYTHON_1)}
WINDOWS = 2_000


def windows(model, schema, mode: str, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Windows around the model's own centres: in deviations, how far and how widely a device's features lie."""
    rng = random.Random(seed)
    from stonechat.features import Normalization

    norm = Normalization(schema, model.metadata.normalization)
    shift, spread = {"idle": (0, 0), "rare": (0, 0), "ordinary": (0.0, 0.7), "busy": (2.5, 0.7), "frantic": (9, 1)}[
        mode
    ]
    for number in range(model.metadata.learn_windows + WINDOWS):
        deltas = []
        for i, kind in enumerate(schema.kinds):
            deviation_q8 = (16 << norm.shift[i]) / norm.inv[i]
            f_q8 = norm.centre_q8[i] + (shift + rng.gauss(0, spread)) * deviation_q8
            if kind == SHARE:
                value = int(min(25600, max(0, norm.centre_q8[i] if mode in ("idle", "rare") else f_q8)))
            elif mode == "idle" or mode == "rare" and number % 7:
                value = 0
            elif mode == "rare":
                value = int(2 ** (norm.centre_q8[i] / 256) - 1)
            else:
                value = int(2 ** min(29.0, max(0.0, f_q8 / 256)) - 1)
            deltas.append(value)
        yield model.metadata.window_ms, deltas


class Notes:
    def __init__(self) -> None:
        self.learning = self.unfit = self.alarms = self.windows = 0
        self.first = ""

    def __call__(self, verdict, agent) -> None:
        self.windows += 1
        self.learning += verdict.learning
        self.unfit += verdict.unfit
        if verdict.level == 2:
            self.alarms += 1
            columns = agent.channels[0].collector.schema.columns
            self.first = self.first or ", ".join(f"{columns[i][0]} {z / 16:+.1f}" for i, z, _ in verdict.explain(3))


def agent_of(collector, model, notes: Notes) -> Agent:
    reporter = Delivery("d-1", bytes(32), MemoryOutbox(), bytes_per_day=0)
    return Agent(collector, model, reporter=reporter, state=State(), on_verdict=notes)


@pytest.mark.parametrize("mode", ["idle", "rare", "ordinary", "busy", "frantic"])
@pytest.mark.parametrize("name", MODELS)
def test_no_device_alarms_for_being_what_it_is(name: str, mode: str) -> None:
    model = load_model((ROOT / "models" / name / "model.tflite").read_bytes())
    schema = SCHEMAS[model.metadata.schema_id]
    notes = Notes()
    replay = Replay(schema, windows(model, schema, mode, 7))
    agent = agent_of(replay, model, notes)
    for now_ms in replay:
        agent.end_window(now_ms)
    assert notes.windows == model.metadata.learn_windows + WINDOWS
    assert notes.alarms == 0, notes.first
    if mode in ("idle", "rare"):
        assert notes.unfit == 0 and notes.learning == model.metadata.learn_windows
    else:
        assert notes.learning < 3 * model.metadata.learn_windows or notes.unfit > WINDOWS // 2
