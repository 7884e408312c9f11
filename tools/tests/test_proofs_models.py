"""The reference models' recordings: listed by hash, and the models' bytes made again from them."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from stonechat.features import RATE
from stonechat.schema import Schema
from stonechat_tools.cli import main
from stonechat_tools.proofs import models
from stonechat_tools.traces.files import write_trace
from stonechat_tools.traces.trace import make_trace

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """name = "pump"
recordings = "recordings/pump"
[record]
window_s = 1.0
windows = 400
devices = [{name = "pump-1", kind = "sensor"}]
[fit]
learn_windows = 40
units = 2
alarm_rules = [[1.0, 2.0, 9.0]]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one reference model and its recording."""
    rng = np.random.default_rng(3)
    schema = Schema("pumps", tuple((name, "1", RATE) for name in "abc"))
    for name in ("pump-1", "pump-2"):  # the second one is not in the recipe
        rows = [(float(i), 1000, "", [int(v) for v in rng.poisson((40, 90, 7))]) for i in range(400)]
        (tmp_path / "recordings/pump").mkdir(parents=True, exist_ok=True)
        write_trace(make_trace(schema, 1000, rows, name), str(tmp_path / f"recordings/pump/{name}.csv.gz"))
    (tmp_path / "models/pump").mkdir(parents=True)
    (tmp_path / "models/pump/recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", "models/pump/recipe.toml", "--json"]) == 0
    assert models.write_hashes(tmp_path / "models") == 1
    return tmp_path


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["models"])
    return models.main(), capsys.readouterr().out


def test_a_model_is_made_again_from_its_recordings(folder, monkeypatch, capsys):
    assert check(monkeypatch, capsys) == (0, "pump: same\n")


def test_another_recipe_gives_another_model(folder, monkeypatch, capsys):
    (folder / "models/pump/recipe.toml").write_text(RECIPE.replace("units = 2", "units = 1"))
    status, text = check(monkeypatch, capsys)
    assert status == 1 and text.startswith("pump: different (model.tflite")


def test_other_recordings_are_named(folder, monkeypatch, capsys):
    path = folder / "recordings/pump/pump-1.csv.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    assert check(monkeypatch, capsys) == (1, "pump: foreign (recordings/pump/pump-1.csv.gz)\n")


def test_recordings_that_are_not_here_stay_in_the_list(folder, monkeypatch, capsys):
    (folder / "recordings/pump/pump-1.csv.gz").unlink()
    assert check(monkeypatch, capsys) == (0, "pump: missing (recordings/pump/pump-1.csv.gz)\n")
    assert models.write_hashes(folder / "models") == 1


def test_cards_and_list_agree():
    """A model whose recordings are listed was made from just these."""
    listed = models.read_hashes(ROOT / "models" / models.HASHES)
    found = set()
    for recipe in models.recipes(ROOT / "models"):
        prefix = str(Path(recipe.recordings).relative_to(ROOT)) + "/"
        own = {name.removeprefix(prefix): digest for name, digest in listed.items() if name.startswith(prefix)}
        own = {name: digest for name, digest in own.items() if recipe.names(name)}
        on_card = dict(re.findall(r"- `(\S+)` ([0-9a-f]{64})", (recipe.folder / "card.md").read_text()))
        assert not own or own == on_card, recipe.name
        if own:
            found.add(recipe.name)
    assert found >= {"linux-1", "linux-1-sensor", "micropython-1"}


@pytest.mark.slow(8)
@pytest.mark.skipif(not (ROOT / "recordings").is_dir(), reason="the recordings are not in the repository")
def test_the_shipped_models_are_made_again_byte_for_byte():
    listed = models.read_hashes(ROOT / "models" / models.HASHES)
    outcomes = [models.remake(recipe, listed, ROOT / "models") for recipe in models.recipes(ROOT / "models")]
    assert {outcome.state for outcome in outcomes} <= {"same", "missing"}, outcomes
