"""Failed logins, counted as the file grows."""

from pathlib import Path

from stonechat.linux import (
    logins,
)


def attempt(path: Path, n: int = 1) -> None:
    with path.open("ab") as file:
        file.write(bytes(logins.RECORD_BYTES * n))


def test_failed_logins_count_what_is_added(tmp_path):
    path = tmp_path / "btmp"
    attempt(path, 3)
    failed = logins.FailedLogins(str(path))
    assert failed.read() == 0  # history
    attempt(path, 2)
    assert failed.read() == 2
    with path.open("ab") as file:
        file.write(b"half a record")
    assert failed.read() == 2


def test_failed_logins_survive_rotation_with_what_was_added_last(tmp_path):
    path = tmp_path / "btmp"
    attempt(path)
    failed = logins.FailedLogins(str(path))
    attempt(path, 2)
    path.rename(tmp_path / "btmp.1")
    assert failed.read() == 2
    path.touch()
    attempt(tmp_path / "btmp.1")  # a writer that had it open
    attempt(path, 4)
    assert failed.read() == 7


def test_failed_logins_survive_truncation_and_a_file_that_comes_late(tmp_path):
    path = tmp_path / "btmp"
    failed = logins.FailedLogins(str(path))
    assert failed.read() == 0
    assert "not there" in failed.note
    attempt(path, 5)
    assert failed.read() == 5
    path.write_bytes(b"")
    assert failed.read() == 5
    attempt(path)
    assert failed.read() == 6
