"""One model to make: from the recordings to model.tflite, golden.json and card.md in a folder."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import check_writable, safe, write_together
from ..traces.files import read_all
from .card import card
from .golden import golden_document, golden_text
from .options import Options, check_name
from .provenance import digest_file
from .quantize import packed_weights
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
    check_name(task.name, "the name (--name, or that of the output folder)")
    check_writable(task.weights)
    trace = read_all(task.recordings)
    origin = {os.path.basename(path): digest_file(path) for path in task.recordings}
    trained = train([trace], task.name, task.version, task.options, show, origin)
    folder = Path(task.output)
    folder.mkdir(parents=True, exist_ok=True)
    benign = trace.select(trace.benign)
    vectors = golden_text(golden_document(trained.data, trace.schema, benign))
    text = card(task.name, task.version, trained, trace, task.command, task.summary, task.limits)
    files: dict[str | os.PathLike[str], bytes | str] = {folder / "golden.json": vectors, folder / "card.md": safe(text)}
    if task.weights:
        files[task.weights] = packed_weights(trained.fitted)
    write_together(files | {folder / "model.tflite": trained.data})
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
