"""Reaching the broker from Linux: name look-ups that nobody waits for, every address, back-off, and plain words."""

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stonechat.errors import MQTTError
from stonechat.linux import resolver as resolver_module
from stonechat.linux.broker_errors import explain
from stonechat.linux.own_client import OwnClient
from stonechat.linux.paho import MAX_PACKET, Paho
from stonechat.linux.resolver import Resolver

CONNACK = b"\x20\x02\x00\x00"
BOTH = pytest.mark.parametrize("kind", [OwnClient, Paho], ids=["own", "paho"])


class Peer:
    """A broker that does what `behave` says with each connection, in a thread of its own."""

    def __init__(self, behave: Callable[[socket.socket], object], address: str = "127.0.0.1", port: int = 0) -> None:
        self.listener = socket.socket()
        self.listener.bind((address, port))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]
        self.behave = behave
        self.times: list[float] = []
        self.held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            self.times.append(time.monotonic())
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        stream.settimeout(20)
        try:
            if self.behave(stream) == "keep":
                self.held.append(stream)
            else:
                stream.close()
        except OSError:
            stream.close()

    def close(self) -> None:
        self.listener.close()
        for stream in self.held:
            stream.close()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made: list[Peer] = []
    yield made
    for peer in made:
        peer.close()


def errors_of(client: Any, seconds: float, until: Callable[[], object] = lambda: False) -> list[str]:
    """Poll for that long -> what poll() raised, as explain() words it; asserts that no poll waited."""
    said = []
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s and not until():
        began_s = time.monotonic()
        try:
            client.poll(0.01)
        except (OSError, MQTTError) as error:
            said.append(explain(error))
        assert time.monotonic() - began_s < 2, "poll() waited"
        if not client.connected:
            time.sleep(0.01)
    return said


def publish_packet(topic: bytes, payload: bytes, qos: int = 0) -> bytes:
    body = struct.pack(">H", len(topic)) + topic + (b"\x00\x07" if qos else b"") + payload
    length = b""
    size = len(body)
    while size > 127:
        length += bytes((size & 127 | 128,))
        size >>= 7
    return bytes((0x30 | qos << 1,)) + length + bytes((size,)) + body


def slow_getaddrinfo(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> None:
    real = resolver_module._socket

    class Module:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        @staticmethod
        def getaddrinfo(*_: object) -> Any:
            return answer()

    monkeypatch.setattr(resolver_module, "_socket", Module())


def infos(*addresses: str, port: int = 1) -> list[Any]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


def until_ready(resolver: Resolver, seconds: float = 10) -> None:
    deadline_s = time.monotonic() + seconds
    while not resolver.ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_look_up_that_never_ends_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    slow_getaddrinfo(monkeypatch, lambda: release.wait(30) and infos("127.0.0.1"))
    resolver = Resolver("broker.example", 1, socket)
    for kind in (OwnClient, Paho):
        client: Any = kind("d", "broker.example", 1, resolver=resolver)
        assert errors_of(client, 0.3) == []
    release.set()
    until_ready(resolver)


def test_the_last_good_address_is_kept_while_the_name_can_not_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [infos("192.0.2.1"), OSError(-3, "Temporary failure")]

    def answer() -> Any:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, OSError):
            raise found
        return found

    slow_getaddrinfo(monkeypatch, answer)
    resolver = Resolver("broker.example", 1, socket)
    for _ in range(3):
        until_ready(resolver)
        assert resolver.getaddrinfo()[0][4] == ("192.0.2.1", 1)


def test_a_kept_address_is_used_when_the_name_servers_fall_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "PATIENCE_MS", 50)
    silent = threading.Event()
    first = [True]

    def answer() -> Any:
        if not first:
            silent.wait(30)
        first.clear()
        return infos("192.0.2.1")

    slow_getaddrinfo(monkeypatch, answer)
    resolver = Resolver("broker.example", 1, socket)
    until_ready(resolver)
    resolver.getaddrinfo()
    until_ready(resolver)
    assert resolver.getaddrinfo()[0][4] == ("192.0.2.1", 1)
    silent.set()


def test_every_address_is_tried_however_the_answer_is_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]

    def answer() -> Any:
        order.append(order.pop(0))
        return infos(*order)

    slow_getaddrinfo(monkeypatch, answer)
    resolver = Resolver("broker.example", 1, socket)
    tried = []
    for _ in range(6):
        until_ready(resolver)
        tried.append(resolver.getaddrinfo()[0][4][0])
    assert sorted(tried[:3]) == sorted(tried[3:]) == sorted(order)


def test_the_own_client_alone_tries_every_address_of_a_rotating_name() -> None:
    from stonechat.mqtt import Client

    order = ["127.0.0.11", "127.0.0.12"]
    tried = []

    class Net:
        SOCK_STREAM = socket.SOCK_STREAM

        @staticmethod
        def getaddrinfo(*_: object) -> Any:
            order.append(order.pop(0))
            return infos(*order)

        @staticmethod
        def socket(*_: object) -> Any:
            class Stream:
                def setblocking(self, _: bool) -> None: ...

                def close(self) -> None: ...

                def connect(self, address: Any) -> None:
                    tried.append(address[0])
                    raise OSError(errno.ECONNREFUSED, "refused")

            return Stream()

    client = Client("d", "broker.example", 1, socket=Net)
    for _ in range(4):
        with pytest.raises(OSError):
            client.connect(False)
    assert set(tried[:2]) == set(tried[2:]) == set(order)


@BOTH
def test_eight_dead_addresses_and_a_good_one(kind: Any, peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing addresses are gone through within seconds, and nothing is reported before all of them failed."""
    peers.append(Peer(lambda stream: stream.recv(100) and stream.sendall(CONNACK) or "keep", "127.0.0.9"))
    port = peers[0].port
    addresses = [f"127.0.0.{i}" for i in range(1, 9)] + ["127.0.0.9"]
    slow_getaddrinfo(monkeypatch, lambda: infos(*addresses, port=port))
    client = kind("d", "broker.example", port)
    assert errors_of(client, 30, lambda: client.connected) == []
    assert client.connected
    client.close()


def closes(stream: socket.socket) -> None:
    stream.recv(100)


def welcomes_and_closes(stream: socket.socket) -> None:
    stream.recv(100)
    stream.sendall(CONNACK)
    time.sleep(0.05)


def welcomes_acknowledges_and_closes(stream: socket.socket) -> None:
    """As a broker does when another client takes the id: everything works, for a moment."""
    stream.recv(200)
    stream.sendall(CONNACK + b"\x40\x02\x00\x01\x40\x02\x00\x02")
    time.sleep(0.1)


def refuses(stream: socket.socket) -> None:
    stream.recv(100)
    stream.sendall(b"\x20\x02\x00\x05")


@BOTH
@pytest.mark.parametrize("behave", [closes, welcomes_and_closes, welcomes_acknowledges_and_closes, refuses])
def test_waits_double_whatever_the_stage_that_fails(kind: Any, behave: Any, peers: list[Peer]) -> None:
    peer = Peer(behave)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    client.on_connect = lambda: client.publish("t", b"x", 1)
    said = errors_of(client, 5)
    client.close()
    assert 3 <= len(peer.times) <= 4, peer.times  # 0, 1, 3, 7 s at the latest; half of that at the earliest
    assert peer.times[1] - peer.times[0] < 1.5, "the first retry comes within a second"
    assert said and len(set(said)) == 1, said


@BOTH
def test_a_connection_whose_end_publish_meets_first_is_not_made_again_at_once(kind: Any, peers: list[Peer]) -> None:
    peer = Peer(welcomes_and_closes)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    errors_of(client, 5, lambda: client.connected)
    time.sleep(0.3)  # the peer has closed
    for _ in range(3):
        with contextlib.suppress(OSError, MQTTError):
            client.publish("t", b"x", 1)
    errors_of(client, 0.3)
    assert len(peer.times) == 1
    client.close()


@BOTH
def test_a_refused_device_is_named(kind: Any, peers: list[Peer]) -> None:
    peer = Peer(refuses)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    assert "not authorized" in errors_of(client, 5, lambda: len(peer.times) > 1)[0]
    client.close()


@BOTH
def test_refused_subscriptions_are_counted_for_each_connection(kind: Any, peers: list[Peer]) -> None:
    def behave(stream: socket.socket) -> str:
        stream.recv(100)
        stream.sendall(CONNACK)
        number = stream.recv(100)[2:4]
        stream.sendall(b"\x90\x03" + number + b"\x80")
        return "keep"

    peer = Peer(behave)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    client.subscribe("a/command", 1)
    errors_of(client, 5, lambda: client.refused)
    assert client.refused == 1
    client.close()


@BOTH
def test_a_packet_of_256_megabytes_is_not_held_in_memory(kind: Any, peers: list[Peer]) -> None:
    sent = [0]

    def behave(stream: socket.socket) -> None:
        stream.recv(100)
        stream.sendall(CONNACK + b"\x32\xff\xff\xff\x7f" + b"\x00\x05a/ack\x00\x09")
        piece = bytes(1 << 16)
        while sent[0] < 200_000_000:
            sent[0] += stream.send(piece)

    peer = Peer(behave)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    errors_of(client, 5, lambda: sent[0])
    before_kb = resident_kb()
    errors_of(client, 3)
    assert resident_kb() - before_kb < 1_000, sent
    client.close()


@BOTH
def test_an_oversize_message_is_acknowledged_and_the_next_arrives(kind: Any, peers: list[Peer]) -> None:
    taken: list[Any] = []

    def behave(stream: socket.socket) -> str:
        stream.recv(100)
        stream.sendall(CONNACK + publish_packet(b"a/ack", bytes(20_000), 1) + publish_packet(b"a/ack", b"next"))
        taken.append(stream.recv(4))
        return "keep"

    peer = Peer(behave)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    client.on_message = lambda topic, payload: taken.append((topic, payload))
    errors_of(client, 10, lambda: len(taken) == 2)
    assert set(taken) == {("a/ack", b"next"), b"\x40\x02\x00\x07"}
    assert client.oversize == 1
    client.close()


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


@BOTH
def test_pubacks_empty_what_is_in_flight(kind: Any, peers: list[Peer]) -> None:
    def behave(stream: socket.socket) -> str:
        stream.recv(100)
        stream.sendall(CONNACK)
        packet = stream.recv(100)
        stream.sendall(b"\x40\x02" + packet[5:7])
        return "keep"

    peer = Peer(behave)
    peers.append(peer)
    client = kind("d", "127.0.0.1", peer.port)
    errors_of(client, 5, lambda: client.connected)
    client.publish("t", b"x", 1)
    assert len(client.in_flight) == 1
    errors_of(client, 5, lambda: not client.in_flight)
    assert not client.in_flight
    client.close()


def test_paho_reads_packets_up_to_the_limit_whole(peers: list[Peer]) -> None:
    taken: list[bytes] = []
    payload = bytes(MAX_PACKET - 7)

    def behave(stream: socket.socket) -> str:
        stream.recv(100)
        for byte in CONNACK + publish_packet(b"a/ack", payload):
            stream.sendall(bytes((byte,)))
        stream.sendall(publish_packet(b"a/ack", payload + b"1") + publish_packet(b"a/ack", b"z"))
        return "keep"

    peer = Peer(behave)
    peers.append(peer)
    client = Paho("d", "127.0.0.1", peer.port)
    client.on_message = lambda topic, got: taken.append(got)
    errors_of(client, 10, lambda: len(taken) == 2)
    assert taken == [payload, b"z"]
    assert client.oversize == 1
    client.close()


def verify_error(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, message)
    error.verify_code, error.verify_message = code, message
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ECONNREFUSED, "Connection refused"), "refused"),
        (socket.gaierror(-2, "Name or service not known"), "not resolved"),
        (verify_error(20, "unable to get local issuer certificate"), "untrusted"),
        (verify_error(10, "certificate has expired"), "expired"),
        (verify_error(62, "Hostname mismatch"), "wrong host"),
        (ssl.SSLError(1, "[SSL: SSLV3_ALERT_CERTIFICATE_REVOKED] sslv3 alert certificate revoked"), "revoked"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "does not speak TLS"),
        (MQTTError("refused, code 5"), "not authorized"),
        (MQTTError("refused, code 4"), "wrong user name or password"),
        (MQTTError("something else"), "something else"),
    ],
)
def test_each_cause_has_words(error: Exception, words: str) -> None:
    text = explain(error)
    assert words in text and "\n" not in text


def certificate(folder: Path, name: str, authority: Any = None, days: tuple[int, int] = (-2, 5)) -> tuple[Any, Any]:
    """Write NAME.crt and NAME.key, for `localhost` unless the name says otherwise -> (certificate, key)."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = (authority[0].subject, authority[1]) if authority else (subject, key)
    host = "example.org" if name == "other" else "localhost"
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days[0]))
        .not_valid_after(now + datetime.timedelta(days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False)
        .add_extension(x509.BasicConstraints(name == "ca", None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        # Python 3.13 refuses certificates without these (ssl.VERIFY_X509_STRICT).
        .add_extension(x509.KeyUsage(True, False, False, False, False, name == "ca", name == "ca", False, False), True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        .sign(signer, hashes.SHA256())
    )
    (folder / f"{name}.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made, key


@BOTH
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("good", ""),
        ("other", "wrong host"),
        ("expired", "expired"),
        ("future", "not valid yet"),
        ("self", "untrusted"),
        ("wants ours", "certificate"),
        ("no tls", "does not speak TLS"),
    ],
)
def test_tls_troubles_have_the_same_words_in_both_transports(
    kind: Any, name: str, words: str, peers: list[Peer], tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    from stonechat.linux.tls import tls_context

    ca = certificate(tmp_path, "ca")
    days = {"expired": (-8, -1), "future": (2, 5)}.get(name, (-2, 5))
    own = "good" if name == "wants ours" else name.replace(" ", "-")
    certificate(tmp_path, own, None if name == "self" else ca, days)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / f"{own}.crt", tmp_path / f"{own}.key")
    if name == "wants ours":
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(tmp_path / "ca.crt")

    def behave(stream: socket.socket) -> str:
        if name == "no tls":
            stream.recv(100)
            stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return ""
        with server.wrap_socket(stream, server_side=True) as wrapped:
            wrapped.recv(100)
            wrapped.sendall(CONNACK)
            time.sleep(3)
        return ""

    peer = Peer(behave)
    peers.append(peer)
    client = kind("d", "localhost", peer.port, tls=tls_context(str(tmp_path / "ca.crt")))
    said: list[str] = []
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s and not client.connected and not said:
        said += errors_of(client, 0.05, lambda: client.connected)
    assert (words in said[0]) if words else client.connected, said
    client.close()


@pytest.mark.parametrize(
    ("which", "kind"),
    [(which, kind) for which in ("ca_file", "cert_file", "key_file") for kind in ("fifo", "folder", "device")]
    + [("key_file", "encrypted")],
)
def test_tls_files_that_would_be_waited_for_are_refused(tmp_path: Path, which: str, kind: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from stonechat.errors import ConfigError
    from stonechat.linux.tls import tls_context
    from stonechat_tools.fleet import provision

    place = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883)).add("d")
    files = {"ca_file": place / "ca.crt", "cert_file": place / "client.crt", "key_file": place / "client.key"}
    tls_context(**{name: str(path) for name, path in files.items()})
    bad = files[which] = tmp_path / "bad"
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "folder":
        bad.mkdir()
    elif kind == "device":
        bad.symlink_to("/dev/zero")
    else:
        key = serialization.load_pem_private_key((place / "client.key").read_bytes(), None)
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        bad.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"x")))
        bad.chmod(0o600)
    with pytest.raises(ConfigError, match="bad is encrypted" if kind == "encrypted" else "bad is not a file"):
        tls_context(**{name: str(path) for name, path in files.items()})


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Also where it lies in the certificate's file."""
    from stonechat.errors import ConfigError
    from stonechat.linux.tls import tls_context
    from stonechat_tools.fleet import provision

    place = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883)).add("d")
    certificate, key = str(place / "client.crt"), str(place / "client.key")
    both = tmp_path / "both.pem"
    both.write_bytes((place / "client.crt").read_bytes() + (place / "client.key").read_bytes())
    both.chmod(0o600)
    tls_context(str(place / "ca.crt"), certificate, key)
    tls_context(str(place / "ca.crt"), str(both))
    for path in (both, place / "client.key"):
        path.chmod(0o640)
    with pytest.raises(ConfigError, match="cert_key_file .*client.key is open to others .mode 640.: chmod 600"):
        tls_context(str(place / "ca.crt"), certificate, key)
    with pytest.raises(ConfigError, match="cert_file .*both.pem is open to others"):
        tls_context(str(place / "ca.crt"), str(both))
