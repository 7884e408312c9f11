"""A dashboard in a process of its own, and requests to it."""

import contextlib
import gzip
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSWORD = "correct horse battery"


class Server:
    def __init__(self, url: str, port: int) -> None:
        self.url = url
        self.port = port

    def ask(
        self, path: str, body: Any = None, method: str | None = None, source: str = "127.0.0.1", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """-> (status, headers with names in lower case, the body as it was packed)."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, source_address=(source, 0))
        with contextlib.closing(link):
            sent = {"Host": f"127.0.0.1:{self.port}"}
            data = None
            if body is not None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                sent |= {"Content-Type": "application/json", "Origin": self.url.rstrip("/")}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            sent = {name: value for name, value in sent.items() if value}
            link.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
            for name, value in sent.items():
                link.putheader(name, value)
            if data is not None:
                link.putheader("Content-Length", str(len(data)))
            link.endheaders(data)
            answer = link.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()

    def json(self, path: str, body: Any = None, **headers: str) -> Any:
        status, found, data = self.ask(path, body, **headers)
        assert status == 200, (status, data)
        return json.loads(gzip.decompress(data) if found.get("content-encoding") == "gzip" else data)

    def log_in(self, name: str, password: str = PASSWORD) -> dict[str, str]:
        """-> the headers of the session."""
        status, headers, data = self.ask("/api/login", {"name": name, "password": password})
        assert status == 200, data
        cookie = headers["set-cookie"].partition(";")[0]
        session = self.json("/api/session", Cookie=cookie)
        return {"Cookie": cookie, "X-CSRF": session["csrf"], "X-CSRF-Token": session["csrf"]}


def command(*words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", "stonechat_tools.cli", "dashboard", *words]
    return subprocess.run(call, input=stdin, capture_output=True, text=True, timeout=120)


@contextlib.contextmanager
def dashboard(db: Path, *options: str) -> Iterator[Server]:
    call = [sys.executable, "-m", "stonechat_tools.cli", "dashboard", "--json"]
    call += [] if "--database-file" in options else ["--db", str(db)]
    if "--listen" not in options:
        options = (*options, "--listen", "127.0.0.1:0")
    log = db.with_name("dashboard.log")
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [*call, *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, log.read_text()
        url = json.loads(line)["url"]
        yield Server(url, int(url.rstrip("/").rpartition(":")[2]))
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(30)
    said = log.read_text()
    assert "Traceback" not in said and "ERROR" not in said, said
