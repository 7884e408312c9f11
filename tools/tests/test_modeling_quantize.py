"""Weights from elsewhere become the same kind of file; the shipped models are what their folders say."""

import json
from pathlib import Path

import numpy as np
import pytest
from stonechat.errors import ConfigError
from stonechat.features import RATE
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat_tools.cli import main
from stonechat_tools.modeling.quantize import WeightsError, read_weights
from stonechat_tools.recording.recipe import read_recipe
from stonechat_tools.recording.session import record
from stonechat_tools.schemas import SCHEMAS
from stonechat_tools.traces.files import read_trace, write_trace
from stonechat_tools.traces.trace import make_trace

SCHEMA = Schema("toy-2", tuple((f"c{i}", "1", RATE) for i in range(6)))
MODELS = Path(__file__).parents[2] / "models"
SHIPPED = sorted(path.parent for path in MODELS.glob("*/model.tflite"))


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    load = np.exp(rng.normal(3, 0.5, 700))
    deltas = rng.poisson(load[:, None] * np.arange(1, 7))
    rows = [(10.0 * i, 10_000, "", deltas[i].tolist()) for i in range(700)]
    write_trace(make_trace(SCHEMA, 10_000, rows, "pump"), tmp_path / "pump.csv.gz")
    return tmp_path / "pump.csv.gz"


def network(**other: object) -> dict[str, object]:
    """A ReLU autoencoder as a stranger would save it."""
    rng = np.random.default_rng(2)
    arrays: dict[str, object] = {
        "w0": rng.normal(0, 0.4, (8, 6)),
        "b0": rng.normal(0, 0.1, 8),
        "activation0": "relu",
        "w1": rng.normal(0, 0.4, (6, 8)),
        "columns": json.dumps([list(column) for column in SCHEMA.columns]),
        "schema": "toy-2",
        "window_ms": 10_000,
        "centre_q8": np.linspace(1200, 1900, 6),
        "deviation_q8": np.full(6, 180.0),
    }
    return {key: value for key, value in (arrays | other).items() if value is not None}


def test_what_train_saved_gives_the_same_network(tmp_path: Path, recording: Path) -> None:
    weights, again = tmp_path / "w.npz", tmp_path / "again.tflite"
    out = tmp_path / "out"
    words = [str(recording), "-o", str(out), "--weights", str(weights), "--learn-windows", "20", "--json"]
    assert main(["train", *words]) == 0
    assert main(["quantize", str(weights), str(recording), "-o", str(again), "--json"]) == 0
    one, two = load_model((out / "model.tflite").read_bytes()), load_model(again.read_bytes())
    assert one.metadata.normalization == two.metadata.normalization
    rng = np.random.default_rng(5)
    for _ in range(50):
        x = np.clip(np.rint(rng.normal(0, 20, 6)), -128, 127).astype(np.int8).tobytes()
        a, b = (np.frombuffer(bytes(model.run(x)), dtype=np.int8).astype(int) for model in (one, two))
        assert np.abs(a - b).max() <= 4  # a quarter of a deviation: the decoder is rounded once more


def test_a_strangers_relu_network(tmp_path: Path, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "w.npz", tmp_path / "m.tflite"
    np.savez(weights, **network())  # type: ignore[arg-type]
    assert main(["quantize", str(weights), str(recording), "-o", str(out), "--learn-windows", "0", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["output_error_q99"] < 0.25 and outcome["macs"] == 96
    scorer = Scorer(load_model(out.read_bytes()), SCHEMA)
    usual = [scorer.score(row, 10_000).surprise_q8 for row in read_trace(recording).deltas[-100:].tolist()]
    strange = scorer.score([4, 100_000, 0, 0, 9, 100_000], 10_000).surprise_q8
    assert strange > max(usual)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w1": np.zeros((5, 8))}, "back to 6"),
        ({"w0": np.full((8, 6), np.nan)}, "finite"),
        ({"activation0": "tanh"}, "tanh"),
        ({"activation1": "relu"}, "last layer"),
        ({"window_ms": None}, "window_ms"),
        ({"columns": "{"}, "w.npz"),
        ({"w0": None, "w1": None}, "none"),
    ],
)
def test_weights_that_are_no_network(tmp_path: Path, change: dict[str, object], said: str) -> None:
    np.savez(tmp_path / "w.npz", **network(**change))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=said):
        read_weights(str(tmp_path / "w.npz"))
    (tmp_path / "w.npz").write_bytes(b"PK no archive")
    with pytest.raises(WeightsError):
        read_weights(str(tmp_path / "w.npz"))


def test_keras_backend(tmp_path: Path, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(recording), "-o", str(tmp_path / "k"), "--backend", "keras", "--seeds", "1", "--units", "2"]
    words += ["--learn-windows", "20", "--json"]
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        assert main(words) == 1 and "stonechat[keras]" in capsys.readouterr().err
        pytest.skip("TensorFlow is not installed: pip install 'stonechat[keras]'")
    assert main(words) == 0
    assert load_model((tmp_path / "k" / "model.tflite").read_bytes()).metadata.learn_windows == 20


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_models(folder: Path) -> None:
    model = load_model((folder / "model.tflite").read_bytes())
    recipe = read_recipe(folder / "recipe.toml")
    assert (
        (model.metadata.name, model.metadata.version) == (recipe.name, recipe.version) == (folder.name, recipe.version)
    )
    assert (folder / "model.tflite").stat().st_size <= 8192 and model.macs <= 8000
    (schema,) = [schema for schema in SCHEMAS.values() if schema.id == model.metadata.schema_id]
    document = json.loads((folder / "golden.json").read_text())
    for window in document["windows"]:
        verdict = Scorer(model, schema).score(window["deltas"], window["elapsed_ms"])
        assert bytes(verdict.x).hex() == window["x"]
        assert (verdict.score_q8, verdict.surprise_q8) == (window["score_q8"], window["surprise_q8"])
    assert model.digest.hex() in (folder / "card.md").read_text()


LABS = (
    'peers = "loopback"',
    'peers = "remote"',
    'collector = "bpf"',
    "guests = true",
    'guests = true\npeers = "loopback"',
)


@pytest.mark.root
@pytest.mark.parametrize("how", LABS)
def test_the_laboratory_records_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    import os
    import shutil
    import subprocess

    if os.geteuid() or not shutil.which("ip") or not shutil.which("nsenter"):
        pytest.skip("the laboratory needs root, ip and nsenter")
    if "guests" in how and not shutil.which("linux.uml"):
        pytest.skip("guests need linux.uml: apt install user-mode-linux")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\nrecordings = "{tmp_path}/rec"\n[record]\nwindow_s = 1\nwindows = 3\n{how}\n'
        'devices = [{name = "lab-1", kind = "sensor"}]\n'
    )
    (path,) = record(read_recipe(recipe))
    trace = read_trace(path)
    assert len(trace) == 3 and trace.device_names == ["lab-1"]
    names = [column[0] for column in trace.schema.columns]
    assert trace.schema.name == ("linux-1" if "bpf" in how else "linux-proc-1")
    assert trace.deltas[:, names.index("bytes_out")].sum() > 0
    if "guests" in how:  # a machine of 256 MB, of which this one would be but a part
        assert 0 < trace.deltas[:, names.index("mem_avail")].min() < 0.9 * 25600
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"stonechat-{os.getpid()}-" not in listed


@pytest.mark.root
def test_a_recording_by_recipe_that_is_terminated_leaves_nothing_and_goes_on(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys
    import time

    if os.geteuid():
        pytest.skip("the laboratory needs root")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\nrecordings = "{tmp_path}/rec"\n[record]\nwindow_s = 0.5\nwindows = 400\n'
        'devices = [{name = "lab-1", kind = "plug"}]\n'
    )
    command = [sys.executable, "-m", "stonechat_tools.cli", "record", "--recipe", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    trace = tmp_path / "rec/lab-1.csv.gz"
    deadline = time.monotonic() + 60
    while not (trace.exists() and trace.stat().st_size and len(read_trace(trace))) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert 0 < len(read_trace(trace)) < 400
    places = ("/run/netns", "/dev/shm", "/tmp")
    assert not [name for place in places for name in os.listdir(place) if name.startswith(f"stonechat-{process.pid}-")]


def test_a_recorder_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal
    import subprocess
    import sys

    from stonechat_tools.recording import session

    monkeypatch.setattr(session, "_CLOSE_S", 0.2)
    deaf = "import signal, time; signal.signal(15, lambda *_: None); print('here', flush=True)\nwhile 1: time.sleep(9)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "here\n"
    session._end(process)
    assert process.returncode == -signal.SIGKILL


def test_a_recipes_later_part_is_recorded_beside_the_model_s_own(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = 'name = "x"\nrecordings = "r"\n[record]\nwindow_s = 2\nwindows = 3\ncollector = "bpf"\ndevices = [{}]\n'
    text += "[later]\nwindows = 5\ndevices = [{}]\n"
    path.write_text(text.format('{name = "a-1", kind = "sensor"}', '{name = "a-2", kind = "sensor"}'))
    recipe = read_recipe(path)
    later = recipe.part("later")
    assert (recipe.recordings, later.recordings) == ("r", "r-later")
    assert (recipe.record["windows"], later.record["windows"], later.record["window_s"]) == (3, 5, 2)
    assert later.record["collector"] == "bpf" and later.record["devices"][0]["name"] == "a-2"
    with pytest.raises(ConfigError, match=r"no \[test\]"):
        recipe.part("test")
    path.write_text(text.format('{name = "a-1", kind = "sensor"}', '{name = "a-2"}'))
    with pytest.raises(ConfigError, match="kind"):
        read_recipe(path)
    assert main(["record", "--recipe", str(path), "--part", "test"]) == 1
    assert main(["record", "x.csv", "--recipe", str(path)]) == 1
    assert main(["record"]) == 1


@pytest.mark.parametrize("how", ['guests = true\ncollector = "bpf"', "guests = 1"])
def test_guests_that_there_can_not_be_are_refused(tmp_path: Path, how: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\nrecordings = "r"\n[record]\nwindow_s = 1\nwindows = 3\n{how}\n'
        'devices = [{name = "lab-1", kind = "sensor"}]\n'
    )
    with pytest.raises(ConfigError, match="guests"):
        read_recipe(recipe)
