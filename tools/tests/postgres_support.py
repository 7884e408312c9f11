"""A PostgreSQL server of the tests' own."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from stonechat_tools.proofs.postgres_server import Server, missing

needs_postgres = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="stonechat-pg-"))
    folder.chmod(0o755)
    server = Server(folder).start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: Server) -> Iterator[Server]:
    """The server, running, with an empty database."""
    if postgres_server.process is None or postgres_server.process.poll() is not None:
        postgres_server.start()
    postgres_server.empty()
    yield postgres_server
