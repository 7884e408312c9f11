"""The verbs that make and judge models, with values and names that nobody means: one line says what is wrong, the
terminal obeys no name, and what is there stays as it was."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import test_odd_arguments as odd_arguments
from stonechat.features import RATE
from stonechat.schema import Schema
from stonechat_tools import cli, console
from stonechat_tools.evaluation import trial
from stonechat_tools.modeling.options import Options
from stonechat_tools.traces.files import write_trace
from stonechat_tools.traces.trace import Trace, join, make_trace

SECOND_MS = 1000
BASE = {
    "dataset join": ["day.csv", "-oj.csv"],
    "dataset label": ["day.csv", "-ol.csv", "--label=x"],
    "dataset append": ["day.csv", "attack.csv", "-oa.csv"],
    "dataset overlay": ["day.csv", "attack.csv", "-oo.csv"],
    "dataset split": ["day.csv", "-oparts"],
    "dataset info": ["day.csv"],
    "dataset import": ["rows.csv", "-oi.csv", "--format=csv", "--time=time"],
    "train": ["day.csv", "-om", "--seeds=1", "--learn-windows=40", "--json"],
    "quantize": ["w.npz", "day.csv", "-oq.tflite"],
    "calibrate": ["m/model.tflite", "later.csv"],
    "evaluate": ["m/model.tflite", "later.csv"],
    "inspect": ["m/model.tflite"],
}


def recording(seed: int, start_s: float, name: str = "pump", windows: int = 300, label: str = "") -> Trace:
    rng = np.random.default_rng(seed)
    schema = Schema("pumps", tuple((f"c{i}", "1", RATE) for i in range(3)))
    rows = [(start_s + i, SECOND_MS, label, rng.poisson((40, 90, 7)).tolist()) for i in range(windows)]
    return make_trace(schema, SECOND_MS, rows, name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Recordings and a model."""
    monkeypatch.chdir(tmp_path)
    write_trace(recording(1, 1e9), "day.csv")
    write_trace(recording(2, 1.1e9), "later.csv")
    write_trace(join([recording(2, 1.1e9), recording(3, 1.2e9, windows=20, label="scan")]), "attacked.csv")
    write_trace(recording(3, 1.2e9, windows=20, label="scan"), "attack.csv")
    Path("rows.csv").write_text("time,a\n" + "".join(f"{1_000_000_000 + i},{i % 7}\n" for i in range(30)))
    words = ["train", "day.csv", "-o", "m", "--seeds", "1", "--learn-windows", "40", "--weights", "w.npz", "--json"]
    assert cli.main(words) == 0
    capsys.readouterr()
    return tmp_path


@pytest.mark.parametrize("verb", sorted({name.split()[0] for name in BASE}))
def test_any_value_costs_one_line(verb, folder, monkeypatch, capsys):
    monkeypatch.setattr(odd_arguments, "BASE", BASE)
    monkeypatch.setattr(odd_arguments, "ALONE", {"dataset"})
    monkeypatch.setattr(odd_arguments, "ALWAYS", ("escape", "no text"))
    Path("a-file").touch()
    before = {path: path.read_bytes() for path in folder.glob("*.csv")}
    for what, words in odd_arguments.calls(verb):
        try:
            status = cli.main(words)
        except SystemExit as ended:
            status = ended.code
        written = capsys.readouterr()
        assert status in (0, 1, 2), (what, words, status)
        for sign in ("unexpected", "Traceback", "Warning", "\x1b"):
            assert sign not in written.err and "\x1b" not in written.out, (what, words, written.err)
        assert not status or written.err.strip(), (what, words)
        assert not [path for path in folder.rglob(".*") if path.suffix != ".npz"], what
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("name", ["[/x]", "[red]x", "\x1b[2Jx", "a\u202eb", "[link=x]y"])
def test_names_in_a_recording_or_a_model_are_shown_as_they_are(folder, capsys, name):
    for path in ("day.csv", "attacked.csv", "later.csv"):  # by hand: our own writer refuses some of them
        text = Path(path).read_text().replace("device=pump", f"device={name}").replace(",scan,", f",scan{name},")
        Path(path).write_text(text.replace("# columns", f"# note made by={name}\n# columns"))
    train = ["train", "day.csv", "-o", f"n{name.replace('/', '_')}", "--seeds", "1", "--learn-windows", "40"]
    printable = name.isprintable()
    assert cli.main([*train, "--name", name]) == (0 if printable else 1)
    model = f"{train[3]}/model.tflite" if printable else "m/model.tflite"
    for words in (
        ["dataset", "info", "attacked.csv"],
        ["calibrate", model, "later.csv", "-o", f"c{name.replace('/', '_')}"],
        ["evaluate", model, "attacked.csv"],
        ["inspect", model],
    ):
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
        written = capsys.readouterr()
        assert "\x1b" not in written.out + written.err and "\u202e" not in written.out, words
        if words[0] == "dataset" or words[0] == "inspect" and printable:
            assert name.encode("unicode_escape").decode() in written.out.replace("\n", "")
    if printable:
        assert "\x1b" not in Path(train[3], "card.md").read_text()


def test_a_full_disk_leaves_the_earlier_model_whole(folder, monkeypatch, capsys):
    files = sorted(Path("m").iterdir())
    before = [path.read_bytes() for path in files]
    write = console.write_atomic

    for failing in range(3):
        written = []

        def fails(path, data, failing=failing, written=written, **options):
            written.append(path)
            if len(written) > failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(path, data, **options)

        monkeypatch.setattr(console, "write_atomic", fails)
        assert cli.main(["train", "later.csv", "-o", "m", "--seeds", "1", "--learn-windows", "40"]) == 1
        assert "make space" in capsys.readouterr().err
        assert sorted(Path("m").iterdir()) == files and [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("option", ["--json", "--page", "--report"])
def test_a_file_that_can_not_be_written_is_named_before_the_work(folder, monkeypatch, capsys, option):
    monkeypatch.setattr(trial, "run_trial", lambda *_: pytest.fail("it began"))
    verb = ["evaluate", "--suite", "--data", "."] if option == "--report" else ["trial", "linux-1"]
    for path, said in (("nowhere/x", "nowhere: No such file"), ("day.csv/x", "Not a directory"), ("m", "regular")):
        assert cli.main([*verb, f"{option}={path}"]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "table",
    [
        {"jitter_octaves": float("nan")},
        {"jitter_percent": float("inf")},
        {"jitter_octaves": 1e300},
        {"jitter_of": {"a": "much"}},
        {"jitter_of": {"a": float("nan")}},
        {"alarm_rules": [[1, 2, float("inf")]]},
        {"alarm_rules": [1, 2, 3]},
        {"alarm_rules": [["a", "b", "c"]]},
        {"latent_range": -1.0},
        {"latent_range": float("nan")},
        {"trim": float("nan")},
        {"seeds": 10**30},
        {"leave_out": 3},
    ],
)
def test_odd_numbers_of_a_recipe_are_named(table):
    with pytest.raises(cli.StonechatError, match=next(iter(table))[:5]):
        Options.of(table, "recipe.toml")


def changed(name: str, deltas: np.ndarray, labels: int = 0) -> None:
    trace = recording(2, 1.1e9, windows=len(deltas))
    trace.deltas[:] = deltas
    trace.labels[len(deltas) - labels :] = "scan"
    write_trace(trace, name)


@pytest.mark.parametrize("value", [0, 7])
def test_counters_that_never_change_prove_nothing(folder, capsys, value):
    changed("odd.csv", np.full((300, 3), value))
    for words in (
        ["train", "odd.csv", "-o", "n"],
        ["calibrate", "m/model.tflite", "odd.csv"],
        ["evaluate", "m/model.tflite", "odd.csv"],
        ["quantize", "w.npz", "odd.csv", "-o", "n.tflite"],
    ):
        assert cli.main(words) == 1, words
        error = capsys.readouterr().err
        assert "no counter of pump changes in 300 benign windows" in error and error.count("\n") == 1
    assert not Path("n").exists() and not Path("n.tflite").exists()


def test_a_device_that_the_model_does_not_fit_is_not_called_silent(folder, capsys):
    wild = np.exp(np.random.default_rng(9).uniform(0, 20, (600, 3))).astype(int)
    changed("odd.csv", wild)
    changed("attacked.csv", wild, labels=20)
    for words in (["calibrate", "m/model.tflite", "odd.csv"], ["evaluate", "m/model.tflite", "odd.csv"]):
        for path in ("odd.csv", "attacked.csv"):
            assert cli.main([*words[:2], path]) == 1
            error = capsys.readouterr().err
            assert "the model does not fit pump" in error and "Train a model on recordings of that device" in error


def test_an_alarm_that_does_not_end_is_no_single_one(folder, capsys):
    counts = np.random.default_rng(9).poisson((40, 90, 7), (900, 3))
    counts[200:] *= 40
    changed("odd.csv", counts)
    assert cli.main(["calibrate", "m/model.tflite", "odd.csv", "--budget", "100/1h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 alarms" in text and "% of the time in alarm" in text
    share = float(text.partition("device-days, ")[2].partition(" %")[0])
    assert share > 70
