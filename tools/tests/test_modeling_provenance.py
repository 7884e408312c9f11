"""No figure is called proven that was measured on the windows that the model was made from, whatever their file is
called and however it was changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stonechat.features import RATE
from stonechat.schema import Schema
from stonechat_tools.cli import main
from stonechat_tools.evaluation import trial_page
from stonechat_tools.modeling import golden
from stonechat_tools.modeling.provenance import holds_training_windows
from stonechat_tools.traces.files import read_trace, write_trace
from stonechat_tools.traces.trace import Trace, join, make_trace

SCHEMA = Schema("provenance-1", tuple((f"c{i}", "1", RATE) for i in range(4)))
MINUTE_MS = 60_000
WINDOWS = 1000


def recording(seed: int, start_s: float, device: str = "pump-1") -> Trace:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(np.exp(rng.normal(5, 0.4, (WINDOWS, 1)) + rng.normal(0, 0.2, (WINDOWS, 4))))
    rows = [(start_s + 60.0 * i, MINUTE_MS, "", row) for i, row in enumerate(counts.tolist())]
    return make_trace(SCHEMA, MINUTE_MS, rows, device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the recording that it was trained on, and a later one."""
    folder = tmp_path_factory.mktemp("provenance")
    write_trace(recording(1, 1e9), folder / "trained.csv.gz")
    write_trace(recording(2, 1.1e9), folder / "later.csv.gz")
    assert main(["train", str(folder / "trained.csv.gz"), "-o", str(folder / "pump"), "--seeds", "1", "--json"]) == 0
    return folder


def changed(folder: Path, how: str) -> str:
    """The training recording in another form."""
    whole, later = read_trace(folder / "trained.csv.gz"), read_trace(folder / "later.csv.gz")
    path = folder / f"{how.replace(' ', '-')}.csv"
    if how == "copied":
        shutil.copy(folder / "trained.csv.gz", path := path.with_suffix(".csv.gz"))
        return str(path)
    if how == "renamed device":
        whole.devices[:] = "other"
    elif how == "labelled":
        whole.labels[-50:] = "scan"
    elif how == "in part":
        whole = whole.select(slice(0, WINDOWS // 2))
    elif how == "joined":
        whole = join([later, whole])
    elif how == "turned round":
        whole = whole.select(slice(None, None, -1))
    write_trace(whole, path)
    return str(path)


FORMS = ("copied", "uncompressed", "renamed device", "labelled", "in part", "joined", "turned round")


@pytest.mark.parametrize("how", FORMS)
def test_a_training_recording_proves_nothing_in_whatever_form(folder, capsys, how):
    model, again = str(folder / "pump/model.tflite"), changed(folder, how)
    assert main(["calibrate", model, again, "--budget", "100/1d"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "proves nothing" in text and "trained on windows of this recording. Record the device again, later" in text
    assert "proves the budget" not in text and "95 %" not in text
    assert main(["calibrate", model, again, "--budget", "100/1d", "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)
    assert choice["proven"] is False and choice["bound_per_30d"] is None and choice["in_sample"]
    assert {row["alarm_rule"] for row in choice["tried"]} == {"patient", "calm", "steady"}
    assert main(["evaluate", model, again]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "in-sample" in text and "95 %" not in text
    assert main(["calibrate", model, again, "--budget", "100/1d", "--fastest", "-o", str(folder / "no.tflite")]) == 1
    assert "needs a later recording" in capsys.readouterr().err
    assert not (folder / "no.tflite").exists()


def test_a_later_recording_proves_and_a_table_made_from_it_does_not(folder, capsys):
    model, later = str(folder / "pump/model.tflite"), str(folder / "later.csv.gz")
    assert main(["calibrate", model, later, "--budget", "100/1d"]) == 0
    assert capsys.readouterr().out.split("\n")[-3].endswith("which proves the budget")
    assert main(["evaluate", model, later, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["in_sample"] is False and figures["false_alarms_per_30d_at_most"] > 0
    assert main(["calibrate", model, later, "--budget", "100/1d", "--table", "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)
    assert choice["proven"] is False and choice["bound_per_30d"] is None and "--table" in choice["in_sample"]


def test_a_clock_that_begins_anew_makes_no_recording_the_same(tmp_path, capsys):
    """Quiet windows of two recordings are the same where both begin at the same time."""
    rng = np.random.default_rng(7)
    for name in ("first", "second"):
        trace = recording(1, 1e9)
        trace.deltas[:] = rng.poisson(0.3, trace.deltas.shape)  # silent, or one event
        trace.deltas[::10] += rng.poisson(40, trace.deltas[::10].shape)
        write_trace(trace, tmp_path / f"{name}.csv")
    first, second = (str(tmp_path / f"{name}.csv") for name in ("first", "second"))
    assert main(["train", first, "-o", str(tmp_path / "m"), "--seeds", "1", "--json"]) == 0
    for path, in_sample in ((first, True), (second, False)):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "m/model.tflite"), path, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["in_sample"] is in_sample


def test_a_page_of_a_trial_gives_no_bound_of_what_was_trained_on():
    figures = {
        "model": "m",
        "window_s": 5,
        "alarm_rules": [[1, 4, 6]],
        "learned_windows": 60,
        "false_alarms": 0,
        "benign_windows": 20,
        "attacks": [
            {
                "attack": "miner",
                "device": "plug-1",
                "windows": 2,
                "windows_to_alarm": 2,
                "peak_evidence": 1.0,
                "top_features": [],
            }
        ],
    }
    later = {"devices": {"a": {}}, "false_alarms": 0, "benign_windows": 9, "device_days": 0.1, "alarm_share": 0.0}
    page = trial_page.page(figures, "c", later | {"in_sample": True, "false_alarms_per_30d_at_most": None})
    assert "On benign recordings that it was trained on" in page and "95 %" not in page
    page = trial_page.page(figures, "c", later | {"in_sample": False, "false_alarms_per_30d_at_most": 9.0})
    assert "that it was not trained on" in page and "at most 9 in 30 days (95 %)" in page


def test_a_shipped_model_without_a_sample_is_recognized_by_its_files():
    data = Path("models/linux-service-1/model.tflite").read_bytes()
    card = Path("models/linux-service-1/card.md").read_text()
    digest = next(word for word in card.split() if len(word) == 64)
    assert holds_training_windows(data, recording(1, 1e9), [digest]) is True
    assert holds_training_windows(data, recording(1, 1e9), ["0" * 64]) is False


def test_runtimes_that_disagree_are_not_taken_for_missing_ones(folder, monkeypatch):
    pytest.importorskip("tflite_micro")
    pytest.importorskip("tflite_runtime")
    monkeypatch.setattr(golden, "outputs", lambda runner, rows: -rows)
    with pytest.raises(golden.ModelError, match="disagree"):
        golden.golden_document((folder / "pump/model.tflite").read_bytes(), SCHEMA, recording(1, 1e9))
