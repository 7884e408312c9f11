"""Keys: files that can't be used cost their own device only; what is derived says nothing of the rest."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from stonechat.errors import ConfigError
from stonechat_tools.fleet import keyring

SECRET = bytes(range(32))
GOOD = SECRET.hex() + "\n"


def reason_of(keys: keyring.Keys, device: str) -> str | None:
    try:
        keys.of(device)
    except keyring.Rejected as rejected:
        return rejected.reason
    return None


def loop(path: Path) -> None:
    path.symlink_to(path)


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "cut off": lambda path: path.write_text(GOOD[:40]),
    "no hex": lambda path: path.write_text("zz\n"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe" + b"0" * 64),
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "link to itself": loop,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "large": lambda path: path.write_text(GOOD * 1000),
    "5000 digits": lambda path: path.write_text("1" * 5000),
    "of another kind": lambda path: path.write_text("report=" + GOOD + "nonsense=" + GOOD),
}


@pytest.mark.parametrize("ending", ["key", "keys"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cant_be_used_costs_its_device_only(tmp_path: Path, kind: str, ending: str) -> None:
    (tmp_path / "good.key").write_text(GOOD)
    keys = keyring.Keys(tmp_path)
    bad = tmp_path / f"bad.{ending}"
    BAD_FILES[kind](bad)
    assert reason_of(keys, "bad") == "key file" and reason_of(keys, "good") is None
    assert list(keys.problems) == ["bad"] and "bad." in keys.problems["bad"]
    if bad.is_dir():
        bad.rmdir()
    else:
        bad.unlink()
    assert reason_of(keys, "bad") == "unknown device" and not keys.problems
    (tmp_path / "bad.key").write_text(GOOD)
    assert reason_of(keys, "bad") is None


@pytest.mark.parametrize("watched", [True, False])
def test_a_folder_that_goes_away_is_named_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """No device is called unknown for it: that would be a warning about each."""
    if not watched:
        monkeypatch.setattr("stonechat_tools.fleet.watch._LOCAL", set())
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "good.key").write_text(GOOD)
    (folder / "better.keys").write_text(keyring.derived_text([SECRET], keyring.COLLECTOR_LABELS))
    keys = keyring.Keys(folder)
    assert reason_of(keys, "good") is reason_of(keys, "better") is None and not keys.problems
    os.rename(folder, tmp_path / "away")
    for _ in range(2):
        keys.refresh()
        assert [str(folder) in why for why in keys.problems.values()] == [True] and not keys.hot
        assert reason_of(keys, "good") == reason_of(keys, "better") == "key file"
    folder.write_text("not a folder")
    assert reason_of(keys, "good") == "key file" and keys.problems
    folder.unlink()
    os.rename(tmp_path / "away", folder)
    keys.refresh()
    assert not keys.problems
    assert reason_of(keys, "good") is reason_of(keys, "better") is None
    assert reason_of(keys, "nobody") == "unknown device"
    with pytest.raises(ConfigError):
        keyring.Keys(tmp_path / "none")


def test_keys_rotate_without_a_restart(tmp_path: Path) -> None:
    keys = keyring.Keys(tmp_path)
    assert reason_of(keys, "pump-1") == "unknown device"
    (tmp_path / "pump-1.key").write_text(GOOD)
    before = keys.of("pump-1")[0]
    (tmp_path / "new").write_text("00" * 32 + "\n" + GOOD)
    os.replace(tmp_path / "new", tmp_path / "pump-1.key")
    now = keys.of("pump-1")
    assert [each.current for each in now] == [True, False]
    assert now[1].fingerprint == before.fingerprint != now[0].fingerprint
    (tmp_path / "pump-1.key").unlink()
    for name in ("pump-1", "../keys/pump-1", "", "+", "x" * 300, "\u00e9"):
        assert reason_of(keys, name) == "unknown device"


def test_the_collectors_file_holds_no_secret_and_no_way_to_command(tmp_path: Path) -> None:
    other = bytes(32)
    (tmp_path / "pump-1.keys").write_text(keyring.derived_text([SECRET, other], keyring.COLLECTOR_LABELS))
    text = (tmp_path / "pump-1.keys").read_text()
    whole = keyring.DeviceKeys(SECRET, "pump-1")
    for hidden in (SECRET, other, keyring.derive(SECRET, b"command"), keyring.derive(other, b"command")):
        assert hidden.hex() not in text
    keys, old = keyring.Keys(tmp_path).of("pump-1")
    for label in keyring.COLLECTOR_LABELS:
        assert getattr(keys, label).open(getattr(whole, label).seal(b"x")) == b"x"
    assert old.report.open(keyring.DeviceKeys(other, "pump-1").report.seal(b"x")) == b"x"
    with pytest.raises(ConfigError, match="the operator has it"):
        keys.command.seal(b"x")
    (tmp_path / "pump-1.keys").write_text(keyring.derived_text([SECRET], keyring.OPERATOR_LABELS))
    (keys,) = keyring.Keys(tmp_path).of("pump-1")
    assert keys.command.seal(b"x") == whole.command.seal(b"x")
    with pytest.raises(ConfigError, match="the collector has it"):
        keys.report.open(b"x")
