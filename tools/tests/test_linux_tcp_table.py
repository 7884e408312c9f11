"""Whom a machine has called, from the kernel's table of TCP connections."""

import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from stonechat.errors import CollectorError
from stonechat.linux.tcp_table import TcpContacts, opened_connections, read_calls

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def row(local: int, peer: str, state: str) -> str:
    address = socket.inet_aton(peer)[::-1].hex().upper()
    return (
        f"   0: 0100A8C0:{local:04X} {address}:01BB {state} 00000000:00000000 00:00000000 00000000     0        0 1\n"
    )


def table(folder: Path, *rows: str) -> None:
    (folder / "net").mkdir(exist_ok=True)
    (folder / "net/tcp").write_text(HEAD + "".join(rows))


def test_a_connection_that_was_closed_from_here_is_one_contact(tmp_path):
    contacts = TcpContacts(b"secret", str(tmp_path))
    table(tmp_path, row(40000, "198.51.100.7", "06"))
    assert len(contacts.contacts()) == 1
    assert contacts.contacts() == []  # still in TIME_WAIT: the same one
    table(tmp_path, row(40000, "198.51.100.7", "06"), row(40001, "198.51.100.7", "06"))
    assert len(contacts.contacts()) == 1


def test_one_that_stays_open_is_a_contact_each_time_and_one_to_here_is_none(tmp_path):
    contacts = TcpContacts(b"secret", str(tmp_path))
    table(
        tmp_path,
        row(22, "0.0.0.0", "0A"),
        row(22, "198.51.100.9", "01"),
        row(40000, "198.51.100.7", "01"),
        row(40000, "127.0.0.1", "01"),
    )
    first = contacts.contacts()
    assert len(first) == 1 and first == contacts.contacts()
    assert all(0 <= peer < 1 << 30 for peer in first)
    assert first != TcpContacts(b"another", str(tmp_path)).contacts()
    assert [socket.inet_ntoa(address[12:]) for address in opened_connections(9, str(tmp_path))] == [
        "198.51.100.7",
        "127.0.0.1",
    ]
    assert len(opened_connections(1, str(tmp_path))) == 1


def test_no_table_and_a_damaged_one(tmp_path):
    assert read_calls(list, str(tmp_path)) == []
    table(tmp_path, "half a row\n")
    assert read_calls(list, str(tmp_path)) == []
    table(tmp_path, "0: 0100A8C0:9C40 ZZ:01BB 01 0\n")
    with pytest.raises(CollectorError, match="is no address"):
        read_calls(list, str(tmp_path))


def test_who_calls_a_listener_that_opens_meanwhile_is_no_call_of_this_machine(tmp_path):
    table(tmp_path, row(22, "0.0.0.0", "0A"))

    def take(calls):
        table(tmp_path, row(22, "0.0.0.0", "0A"), row(8080, "0.0.0.0", "0A"), row(8080, "198.51.100.9", "01"))
        return list(calls)

    assert read_calls(take, str(tmp_path)) == []


def test_a_large_table_is_never_held_as_a_whole(tmp_path):
    """A scan, or a web server, leaves thousands of connections in TIME_WAIT, and Python does not give memory back."""
    table(tmp_path, row(22, "0.0.0.0", "0A"), *[row(20000 + n, "198.51.100.7", "06") for n in range(6000)])
    contacts = TcpContacts(b"secret", str(tmp_path))
    for what, most_bytes in ((lambda: opened_connections(512, str(tmp_path)), 50_000), (contacts.contacts, 1_000_000)):
        tracemalloc.start()
        what()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most_bytes


def test_this_machine_s_own_connection_is_found():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.close()
        port = b"%04X" % client.getsockname()[1]
        assert port in [local for _, local, _, _ in read_calls(list)]


OTHER = """
import socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network of its own")
def test_the_agents_own_connection_is_no_contact_and_another_process_s_is():
    """A broker at a new address is no lasting peer, whoever the agent runs as."""
    done = subprocess.run(
        [sys.executable, "-c", OWN_NETWORK, OTHER], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["0", "1", "0"], done.stderr


OWN_NETWORK = """
import os, socket, subprocess, sys
from stonechat.linux.tcp_table import TcpContacts
here = "192.0.2.1"
os.unshare(os.CLONE_NEWNET) if hasattr(os, "unshare") else __import__("ctypes").CDLL(None).unshare(0x40000000)
for line in ("link set lo up", "addr add %s/32 dev lo" % here):
    subprocess.run(["ip"] + line.split(), check=True)
server = socket.create_server((here, 0))
address = server.getsockname()
contacts = TcpContacts(b"secret")
broker = socket.create_connection(address)
print(len(contacts.contacts()))
other = subprocess.Popen([sys.executable, "-c", sys.argv[1], here, str(address[1])], stdin=-1, stdout=-1)
other.stdout.readline()
print(len(contacts.contacts()))
other.communicate(b"")
contacts.contacts()  # it sees that one in TIME_WAIT
broker.close()
print(len(contacts.contacts()))
"""
