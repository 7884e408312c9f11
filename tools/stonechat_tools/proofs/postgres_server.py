"""A PostgreSQL server for tests and proofs: Debian's, as its own user, on a free port of loopback."""

import contextlib
import glob
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

from ..fleet.local_broker import free_port

FOUND = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
START_S = 90.0
POSTGRES = FOUND[-1] if FOUND else shutil.which("postgres")


def _user() -> str | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None


def missing() -> str:
    """Why there is no server here, "" where there is one."""
    if POSTGRES is None or (os.geteuid() == 0 and _user() is None):
        return "PostgreSQL is not installed (make setup, as root)"
    return ""


class Server:
    """start(), kill() as by kill -9, and the URL of its database."""

    def __init__(self, folder: Path) -> None:
        assert POSTGRES
        self.data = folder / "data"
        self.port = free_port()
        self.url = f"postgresql://tester:secret@127.0.0.1:{self.port}/postgres"
        self._as = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self._log = folder / "log"
        self._home = folder
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "password").write_text("secret\n")
        if self._as:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        command = [str(Path(POSTGRES).parent / "initdb"), "-D", str(self.data), "-U", "tester", "-A", "scram-sha-256"]
        command += ["--pwfile", str(folder / "password"), "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder, **self._as)  # type: ignore[call-overload]

    def start(self) -> "Server":
        assert POSTGRES
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(  # type: ignore[call-overload]
                [POSTGRES, "-D", str(self.data), "-p", str(self.port), "-k", "", "-h", "127.0.0.1"]
                + ["-c", "shared_buffers=32MB", "-c", "max_connections=20"],
                stdout=log,
                stderr=log,
                cwd=self._home,
                start_new_session=True,
                **self._as,
            )
        end_s = time.monotonic() + START_S
        while not self._answers():
            if time.monotonic() > end_s or self.process.poll() is not None:
                raise OSError(f"PostgreSQL does not start: {self._log.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.Error), psycopg.connect(self.url, connect_timeout=2):
            return True
        return False

    def stop(self) -> None:
        """At once, without waiting for sessions."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        assert self.process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def _end(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)
        self.process.wait(30)

    def empty(self) -> None:
        """The database as new."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute("DROP SCHEMA public CASCADE")
            db.execute("CREATE SCHEMA public")
