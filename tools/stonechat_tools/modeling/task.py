"""One model to make: from the recordings to model.tflite, golden.json and card.md in a folder."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import write_atomic
from ..traces.files import read_all
from .card import card
from .golden import golden_document, golden_text
from .options import Options
from .provenance import digest_file
from .quantize import save_weights
from .training import train

DONE = "outcome.json"


@dataclass
class Task:
    """One model to make; a plain value, so that it can be sent to another process or machine."""

    recordings: list[str]
    output: str
    name: str
    version: int
    options: Options
    command: str
    summary: str = ""
    limits: list[str] = field(default_factory=list)
    weights: str | None = None


def make(task: Task, show: Callable[[str, float], None] = lambda what, share: None) -> dict[str, Any]:
    """Do one task: read, train, write -> its outcome (as in outcome.json)."""
    show("reading", 0.0)
    trace = read_all(task.recordings)
    origin = {os.path.basename(path): digest_file(path) for path in task.recordings}
    trained = train([trace], task.name, task.version, task.options, show, origin)
    folder = Path(task.output)
    folder.mkdir(parents=True, exist_ok=True)
    benign = trace.select(trace.benign)
    vectors = golden_text(golden_document(trained.data, trace.schema, benign))
    text = card(task.name, task.version, trained, trace, task.command, task.summary, task.limits)
    write_atomic(folder / "golden.json", vectors.encode())
    write_atomic(folder / "card.md", text.encode())
    write_atomic(folder / "model.tflite", trained.data)
    if task.weights:
        save_weights(task.weights, trained.fitted)
    figures = trained.figures
    return {
        "name": task.name,
        "model": str(folder / "model.tflite"),
        "schema": trace.schema.name,
        "windows": int(trace.benign.sum()),
        "digest": figures["digest"],
        "file_bytes": figures["file_bytes"],
        "macs": figures["macs"],
        "units": figures["units"],
        "held_out_windows": figures["held_out_windows"],
        "held_out_alarms": figures["held_out_alarms"],
        "alarms_per_30_days_at_most_95": figures["alarms_per_30_days_at_most_95"],
    }
