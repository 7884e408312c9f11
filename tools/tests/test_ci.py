"""CI's own rules: a skip that is not on the list fails a run; every list of the project names what exists."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest
def test_one(): pass
def test_two(): pytest.skip("needs a sunny day, by name")
@pytest.mark.skipif(True, reason="needs rain")
def test_three(): pass
@pytest.mark.xfail
def test_four(): assert False
"""


def run(folder: Path, allowed: str) -> "subprocess.CompletedProcess[str]":
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "test_it.py").write_text(TESTS)
    (folder / "allowed").write_text(allowed)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command += ["-c", "/dev/null", "--allowed-skips", str(folder / "allowed"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)


def test_a_skip_that_is_not_on_the_list_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "# weather\nneeds a sunny day*\n")
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if "NOT ALLOWED" in line] == [
        "SKIP NOT ALLOWED test_it.py::test_three: needs rain"
    ]


def test_skips_on_the_list_pass(tmp_path: Path) -> None:
    done = run(tmp_path, "needs *\n")
    assert done.returncode == 0, done.stdout


def test_a_module_that_is_skipped_whole_counts_too(tmp_path: Path) -> None:
    (tmp_path / "test_more.py").write_text("import pytest\npytest.importorskip('no_such_package_here')\n")
    done = run(tmp_path, "needs *\n")
    assert done.returncode == 1 and "NOT ALLOWED test_more.py" in done.stdout


def test_a_worker_begins_with_the_longest_file(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    lengths = {"a": ["slow(4)"], "b": [], "c": ["slow(3)", "slow(3)"], "d": ["slow"], "e": []}
    for name, marks in lengths.items():
        tests = [f"@pytest.mark.{mark}\ndef test_{n}(): pass\n" for n, mark in enumerate(marks)]
        (tmp_path / f"test_{name}.py").write_text("import pytest\ndef test_it(): pass\n" + "".join(tests))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-c",
        "/dev/null",
    ]
    command += ["-n", "1", "--dist", "loadfile", "--no-loadscope-reorder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    order = [line.split("::")[0][-4] for line in done.stdout.splitlines() if "PASSED" in line]
    assert "".join(dict.fromkeys(order)) == "cabde", done.stdout + done.stderr


def test_what_make_test_system_runs_is_in_the_files_that_it_names() -> None:
    files = {path for folder in ("tools", "firmware_tests") for path in (ROOT / folder).rglob("test_*.py")}
    marked = {path for path in files - {Path(__file__)} if "mark.system" in path.read_text()}
    assert marked == set((ROOT / "tools/tests").glob("test_system_*.py"))


def test_set_up_and_ci_are_well_formed_shell() -> None:
    for script in ("tools/setup.sh", ".ci/run"):
        done = subprocess.run(["sh", "-n", script], capture_output=True, text=True, cwd=ROOT, timeout=30)
        assert done.returncode == 0, done.stderr


_TRIES = """
import sys, time
from pathlib import Path
from once import once

def fill(folder):
    for name in "ab":
        (folder / name).write_text(name)
        time.sleep(0.2)
    with open(sys.argv[1] + ".count", "a") as count:
        count.write("1")

print(sorted(path.name for path in once(Path(sys.argv[1]), fill, sys.argv[2]).iterdir()))
"""


def test_workers_fill_a_shared_folder_once(tmp_path: Path) -> None:
    """Two workers that need the same download: the second waits, and neither removes what the other has begun."""
    folder, here = tmp_path / "shared", Path(__file__).parent
    for wanted in ("1", "2"):  # another list of packages: made anew
        command = [sys.executable, "-c", _TRIES, str(folder), wanted]
        workers = [subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        assert [worker.communicate(timeout=60)[0] for worker in workers] == ["['a', 'b']\n"] * 4
        assert (tmp_path / "shared.count").read_text() == "1" * int(wanted)
