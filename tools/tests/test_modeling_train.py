"""From a recording to a .tflite with its card: one command; and what becomes of mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from stonechat.custom_counters import counter_schema
from stonechat.errors import ConfigError
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat_tools.cli import main
from stonechat_tools.modeling.device_path import to_features
from stonechat_tools.modeling.options import Options
from stonechat_tools.modeling.training import borrow_quiet, injected_recall, train
from stonechat_tools.traces.files import write_trace
from stonechat_tools.traces.trace import Trace, join, make_trace

SCHEMA = Schema(
    "toy-1",
    (
        ("bytes_out", "B", RATE),
        ("pkts_out", "packets", RATE),
        ("conn_out", "connections", RATE),
        ("conn_fail", "connections", RATE),
        ("sockets", "1", LEVEL),
        ("cpu_busy", "%", SHARE),
        ("forks", "tasks", RATE),
        ("ctxt", "switches", RATE),
    ),
)
NAMES = [column[0] for column in SCHEMA.columns]


def recording(n: int = 600, device: str = "lamp", seed: int = 1, label: str = "benign", scale: float = 1.0) -> Trace:
    """A device whose bytes and packets go together, as do its forks and processor time."""
    rng = np.random.default_rng(seed)
    pkts = rng.poisson(40 * scale * np.exp(rng.normal(0, 0.4, n)))
    forks = rng.poisson(3, n)
    busy = np.clip(rng.normal(5, 1.5, n) + forks, 0, 100) * 256
    columns = [pkts * 120 + rng.integers(0, 900, n), pkts, rng.poisson(2, n), rng.poisson(0.05, n)]
    columns += [rng.integers(4, 7, n), busy, forks, rng.poisson(300, n) + forks * 20]
    deltas = np.array(columns, dtype=np.int64).T
    rows = [(1000.0 + 5 * i, 5000, label, deltas[i].tolist()) for i in range(n)]
    return make_trace(SCHEMA, 5000, rows, device)


def scan(n: int = 40) -> Trace:
    trace = recording(n, seed=9, label="scan")
    trace.deltas[:, NAMES.index("conn_out")] += 400
    trace.deltas[:, NAMES.index("conn_fail")] += 390
    return trace


def test_one_command_makes_a_model_that_a_device_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(join([recording(), scan()]), tmp_path / "lamp.csv.gz")
    out = tmp_path / "lamp-model"
    words = ["train", str(tmp_path / "lamp.csv.gz"), "-o", str(out), "--learn-windows", "40", "--json"]
    assert main(words) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["name"] == "lamp-model" and outcome["windows"] == 600 and outcome["held_out_windows"] == 120
    data = (out / "model.tflite").read_bytes()
    assert outcome["file_bytes"] == len(data) < 8192
    scorer = Scorer(load_model(data), SCHEMA)
    for row in recording(120, seed=2).deltas.tolist():
        verdict = scorer.score(row, 5000)
    assert not verdict.learning and verdict.level == 0
    levels = [scorer.score(row, 5000).level for row in scan(60).deltas.tolist()]
    assert max(levels) == 2
    assert {NAMES[i] for i, _, _ in verdict.explain()} & {"conn_out", "conn_fail"}
    card = (out / "card.md").read_text()
    assert "40 windows labelled as attacks were left out" in card and "lamp.csv.gz" in card
    assert outcome["digest"] in card and "bounds the rate" in card.replace("\n", " ")


def test_golden_windows_are_what_a_device_computes(tmp_path: Path) -> None:
    write_trace(recording(), tmp_path / "lamp.csv")
    assert main(["train", str(tmp_path / "lamp.csv"), "-o", str(tmp_path), "--learn-windows", "0", "--json"]) == 0
    document = json.loads((tmp_path / "golden.json").read_text())
    model = load_model((tmp_path / "model.tflite").read_bytes())
    assert len(document["windows"]) == 12 and document["schema_id"] == SCHEMA.id.hex()
    for window in document["windows"]:
        scorer = Scorer(model, SCHEMA)
        verdict = scorer.score(window["deltas"], window["elapsed_ms"])
        assert bytes(verdict.x).hex() == window["x"]
        assert (verdict.score_q8, verdict.surprise_q8) == (window["score_q8"], window["surprise_q8"])
    for x, y, _ in document["vectors"]:
        assert bytes(model.run(bytes.fromhex(x))).hex() == y


def test_the_same_recording_gives_the_same_model() -> None:
    options = Options(seeds=2, learn_windows=20, jitter_octaves=0.3, jitter_percent=3.0)
    one = train([recording()], "a", 1, options)
    assert one.data == train([recording()], "a", 1, options).data
    assert one.data != train([recording(seed=5)], "a", 1, options).data
    assert len(one.figures["tried"]) >= 2
    best = max(row["injected_found"] for row in one.figures["tried"])
    table = to_features(recording().select(slice(360, 480)))
    assert injected_recall(one.fitted, table) == pytest.approx(best, abs=1e-3)


def test_devices_are_centred_as_their_own_learning_will() -> None:
    quiet, loud = recording(device="a"), recording(device="b", seed=3, scale=60.0)
    apart = train([quiet, loud], "x", 1, Options(learn_windows=40, units=3))
    together = train([quiet, loud], "x", 1, Options(learn_windows=40, units=3, centre_devices=True))
    i = NAMES.index("pkts_out")

    def deviation(model: object) -> float:
        norm = Scorer(load_model(model.data), SCHEMA).normalization  # type: ignore[attr-defined]
        return float(16 * 2 ** norm.shift[i] / norm.inv[i])

    assert deviation(together) < deviation(apart) / 2
    assert together.figures["held_out_alarms"] == 0


def test_busy_windows_borrow_the_machines_columns_only() -> None:
    trace = recording()
    at = NAMES.index("cpu_busy")
    trace.deltas[::3, at] = 90 * 256
    before = trace.deltas.copy()
    assert borrow_quiet(trace, ["cpu_busy > 50"], ["cpu_busy", "forks"]) == 200
    assert trace.deltas[:, at].max() < 50 * 256
    changed = [NAMES[i] for i in range(len(NAMES)) if not np.array_equal(before[:, i], trace.deltas[:, i])]
    assert changed == ["cpu_busy", "forks"]
    with pytest.raises(ConfigError, match="no feature"):
        borrow_quiet(trace, ["disk > 50"], [])


def test_each_class_resumes_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        write_trace(recording(400, seed=i), tmp_path / f"class{i}.csv.gz")
    (tmp_path / "class3.csv.gz").write_bytes(b"damaged")
    words = ["train", "--each", *map(str, sorted(tmp_path.glob("*.csv.gz"))), "-o", str(tmp_path / "out")]
    words += ["--jobs", "2", "--learn-windows", "20", "--json"]
    assert main(words) == 1
    first = json.loads(capsys.readouterr().out)
    assert [outcome["name"] for outcome in first] == ["class0", "class1", "class2", "class3"]
    assert "error" in first[3] and "not a stonechat trace" in first[3]["error"]
    models = [tmp_path / "out" / f"class{i}" / "model.tflite" for i in range(3)]
    made = [path.stat().st_mtime_ns for path in models]
    write_trace(recording(400, seed=7), tmp_path / "class1.csv.gz")
    write_trace(recording(400, seed=8), tmp_path / "class3.csv.gz")
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    after = [path.stat().st_mtime_ns for path in models]
    assert after[0] == made[0] and after[2] == made[2] and after[1] != made[1]
    assert again[0] == first[0] and again[1]["digest"] != first[1]["digest"] and "error" not in again[3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--recipe"),
        (["MISSING", "-o", "X"], "No such file"),
        (["SHORT", "-o", "X"], "record longer"),
        (["SHORT", "-o", "X", "--seeds", "0"], "seeds 0"),
        (["SHORT", "-o", "X", "--learn-windows", "3"], "even number"),
        (["LONG", "-o", "X", "--learn-windows", "300"], "record longer, or lower learn_windows"),
        (["LONG", "-o", "X", "--budget", "never", "--learn-windows", "20"], "alarms per time"),
        (["SHORT", "-o", "X", "--record"], "--recipe"),
        (["--each", "SHORT", "SHORT", "-o", "X"], "same name"),
        (["--recipe", "MISSING"], "No such file"),
        (["ATTACK", "-o", "X"], "0 benign windows"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    write_trace(recording(60), tmp_path / "short.csv")
    write_trace(scan(), tmp_path / "attack.csv")
    write_trace(recording(), tmp_path / "long.csv")
    files = {"LONG": "long.csv", "SHORT": "short.csv", "MISSING": "missing.csv", "X": "x", "ATTACK": "attack.csv"}
    assert main(["train", *[str(tmp_path / files[word]) if word in files else word for word in words]]) == 1
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    write_trace(recording(), recordings / "lamp.csv.gz")
    recipe = tmp_path / "model" / "recipe.toml"
    recipe.parent.mkdir()
    good = f'name = "lamp-1"\nversion = 4\nsummary = "A lamp."\nlimits = ["Only lamps."]\nrecordings = "{recordings}"\n'
    recipe.write_text(good + "[fit]\nlearn_windows = 40\nunits = 3\nalarm_rules = [[1.0, 2, 9.0]]\n")
    assert main(["train", "--recipe", str(recipe), "--json"]) == 0
    meta = load_model((recipe.parent / "model.tflite").read_bytes()).metadata
    assert (meta.name, meta.version, meta.learn_windows, meta.alarm_rules) == ("lamp-1", 4, 40, ((256, 512, 2304),))
    card = (recipe.parent / "card.md").read_text()
    assert "A lamp." in card and "Only lamps." in card and "9 windows" in card
    capsys.readouterr()
    for text, said in (
        ("name = 3\n", "name is 3"),
        (good + "colour = 1\n", "unknown key 'colour'"),
        (good + "[fit]\nunits = true\n", "units is True"),
        (good + "[fit]\nalarm_rules = [[2, 1, 9]]\n", "an alarm rule is"),
        (good + '[fit]\nleave_out = ["cpu_busy"]\n', "NAME > NUMBER"),
        (good + "[record]\nwindows = 3\n", "devices"),
        (good + '[record]\nwindow_s = 1\nwindows = 3\ndevices = [{name = "a"}]\n', "name and kind"),
        ("name = ", "not TOML"),
    ):
        recipe.write_text(text)
        assert main(["train", "--recipe", str(recipe)]) == 1
        message = capsys.readouterr().err
        assert said in message, message


def test_a_vendors_own_counters_are_trained_scored_and_explained(tmp_path: Path) -> None:
    """The wearable of the manual: steps a minute, heart rate, and a battery."""
    columns = (("steps", "steps", RATE), ("heart_rate", "1/min", LEVEL), ("battery", "%", SHARE))
    schema = counter_schema("wearable-1", columns)
    rng = np.random.default_rng(4)
    walking = rng.random(600) < 0.3
    steps = np.where(walking, rng.poisson(100, 600), rng.poisson(2, 600))
    heart = np.where(walking, rng.normal(110, 6, 600), rng.normal(70, 5, 600)).astype(int)
    battery = (60 + 20 * np.sin(np.arange(600) / 90)) * 256
    rows = [(60.0 * i, 60_000, "", [int(steps[i]), int(heart[i]), int(battery[i])]) for i in range(600)]
    trained = train([make_trace(schema, 60_000, rows, "wearable")], "wearable-1", 1, Options(learn_windows=0))
    scorer = Scorer(load_model(trained.data), schema)
    for _, elapsed_ms, _, deltas in rows[-20:]:
        usual = scorer.score(deltas, elapsed_ms).surprise_q8
    verdict = scorer.score([9000, 72, 60 * 256], 60_000)  # a shaker, not a walk
    assert verdict.surprise_q8 > usual and verdict.surprise_q8 > 512
    assert columns[verdict.explain(1)[0][0]][0] == "steps"
