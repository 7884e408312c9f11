"""The set-up of a fresh clone: small for the demo, whole after an interruption, without a network the second time."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from debian import STORE, root_folder, why_not

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
DEMO_MEGABYTES = 60


@pytest.fixture(scope="module", autouse=True)
def _network(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A first set-up needs one."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "-d"]
    if subprocess.run([*command, tmp_path_factory.mktemp("probe"), "pip"], capture_output=True).returncode:
        pytest.skip("no network: a first set-up can't be tried")


def clone(folder: Path) -> Path:
    """What is committed, and what the working copy has besides: as a stranger would get it after the next commit."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        source = ROOT / name
        if name and (source.is_file() or source.is_symlink()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name, follow_symlinks=False)
    return folder


def setup(folder: Path, *before: str, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
    command = [*before, "sh", "tools/setup.sh", "demo"]
    return subprocess.run(command, cwd=folder, env=CLEAN, capture_output=True, text=True, timeout=timeout_s)


def works(folder: Path) -> bool:
    done = subprocess.run([folder / ".venv/bin/stonechat", "--version"], capture_output=True, text=True, cwd=folder)
    return done.stdout.startswith("stonechat ")


needs_unshare = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network namespace")


@needs_unshare
def test_the_demos_level_is_small_and_needs_no_network_again(tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    done = setup(folder)
    assert done.returncode == 0 and works(folder), done.stdout + done.stderr
    assert "MB to download" in done.stdout
    size = sum(path.lstat().st_size for path in (folder / ".venv").rglob("*")) / 1e6
    assert size < DEMO_MEGABYTES
    again = setup(folder, "unshare", "--net")
    assert (again.returncode, again.stdout) == (0, "") and works(folder)


def interrupted(folder: Path, number: int, seconds: float) -> None:
    process = subprocess.Popen(
        ["sh", "tools/setup.sh", "demo"],
        cwd=folder,
        env=CLEAN,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(30)


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 1), (signal.SIGKILL, 4), (signal.SIGTERM, 6)])
def test_it_goes_on_after_an_interruption(tmp_path: Path, number: int, seconds: float) -> None:
    folder = clone(tmp_path / "clone")
    interrupted(folder, number, seconds)
    done = setup(folder)
    assert done.returncode == 0 and works(folder), done.stdout + done.stderr


def test_a_venv_without_pip_is_made_anew(tmp_path: Path) -> None:
    """What `python3 -m venv` leaves where there is no ensurepip."""
    folder = clone(tmp_path / "clone")
    subprocess.run(["python3", "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    done = setup(folder)
    assert done.returncode == 0 and works(folder), done.stdout + done.stderr


def test_a_python_that_is_too_old_is_one_line(tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = setup(folder, "env", f"PYTHON={old}")
    assert done.returncode == 1 and "older than 3.11" in done.stderr and not (folder / ".venv").exists()


@pytest.mark.root
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_an_ordinary_user_of_a_debian_without_ensurepip(tmp_path: Path) -> None:
    """Debian without python3-venv, in a chroot with this machine's network: pip comes from Debian's own wheel."""
    root = STORE / "without-ensurepip"
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", root_folder("bookworm"), root], check=True)
    try:
        for path in ("usr/lib/python3.11/ensurepip", "usr/share/python-wheels"):
            shutil.rmtree(root / path)
        for path in ("etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).unlink(missing_ok=True)
            shutil.copyfile("/" + path, root / path)
        subprocess.run(["chroot", root, "useradd", "--create-home", "tom"], check=True)
        clone(root / "home/tom/clone")
        subprocess.run(["chroot", root, "chown", "-R", "tom", "/home/tom"], check=True)
        here = ["chroot", str(root), "su", "tom", "-c"]
        done = subprocess.run([*here, "cd ~/clone && sh tools/setup.sh demo"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "has no ensurepip" in done.stdout and "not root" in done.stdout
        done = subprocess.run([*here, "~/clone/.venv/bin/stonechat-agent --version"], capture_output=True, text=True)
        assert done.stdout.startswith("stonechat-agent "), done.stderr
        done = subprocess.run([*here, "cd ~/clone && sh tools/setup.sh demo"], capture_output=True, text=True)
        assert done.returncode == 0 and "making" not in done.stdout and "installing" not in done.stdout
    finally:
        shutil.rmtree(root, ignore_errors=True)
