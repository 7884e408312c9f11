"""The tools' connection to the broker: paho-mqtt with two things added.

A packet takes memory by its length only up to MAX_PACKET_BYTES. Of a longer one the first KEPT_BYTES are kept, enough
to acknowledge it; the rest is read in small pieces and dropped. A packet that paho's parser fails on ends the
connection and not the thread. `explain` puts an error of the network into words.
"""

import contextlib
import socket
import ssl
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

MAX_PACKET_BYTES = 8192
KEPT_BYTES = 1024
_CHUNK_BYTES = 4096


class BoundedClient(paho.Client):
    """A paho client (MQTT 3.1.1, reconnects after 1 to 30 s). Takes host-independent options of Collector."""

    def __init__(
        self,
        client_id: str = "",
        *,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        clean_session: bool = True,
        manual_ack: bool = False,
    ) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=clean_session,
            protocol=paho.MQTTv311,
            manual_ack=manual_ack,
        )
        if username is not None:
            self.username_pw_set(username, password)
        if tls is not None:
            self.tls_set_context(tls)
        self.reconnect_delay_set(1, 30)

    def _sock_recv(self, bufsize: int) -> bytes:
        packet = self._in_packet
        if packet["remaining_length"] > MAX_PACKET_BYTES and bufsize == packet["to_process"]:
            del packet["packet"][KEPT_BYTES:]
            bufsize = min(bufsize, _CHUNK_BYTES)
        return super()._sock_recv(bufsize)

    def _packet_handle(self) -> MQTTErrorCode:
        if self._in_packet["command"] & 0xF4 == 0x34:  # QoS 2, which we never ask for, is kept until a release comes
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        try:
            return super()._packet_handle()
        except Exception:  # whatever the parser raises on a packet that is none
            return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def break_off(self) -> None:
        """End this connection; the client connects again, and the broker repeats what was not acknowledged."""
        connected: Any = self.socket()
        if connected is not None:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def explain(host: str, port: int, error: BaseException | None) -> str:
    """One line: what is wrong with the connection, and where the fix may be."""
    where = f"broker {host}:{port}"
    if isinstance(error, socket.gaierror):
        return f"{where}: the name {host} can't be resolved ({error.strerror})"
    if isinstance(error, ConnectionRefusedError):
        return f"{where}: connection refused; is the broker running, and on this port?"
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message.rstrip(".")
        return f"{where}: the broker's certificate is not accepted: {why}; {_certificate_fix(host, error.verify_code)}"
    if isinstance(error, ssl.SSLError):
        if alert := certificate_alert(error):
            return f"{where}: {alert}"
        hint = "; does this port speak TLS? see --plain" if "WRONG_VERSION" in str(error) else ""
        return f"{where}: TLS: {error.reason or error}{hint}"
    if isinstance(error, TimeoutError):
        return f"{where}: no answer"
    if isinstance(error, OSError):
        return f"{where}: {error.strerror or error}"
    return f"{where}: {error or 'no connection'}"


def _certificate_fix(host: str, code: int) -> str:
    """What to do about a certificate that was refused with one of OpenSSL's codes (X509_V_ERR_...)."""
    if code in (62, 64):
        return f"`stonechat broker-config --name {host}` makes one for this name"
    if code == 10:
        return "`stonechat broker-config` makes a new one; then restart the broker"
    if code == 9:
        return "set the clock of this machine, or of the one that made it"
    return "see --cafile"


_ALERTS = {  # what the broker says of our certificate; a word of OpenSSL's reason, then ours
    "CERTIFICATE_EXPIRED": "the certificate of --cert has expired: `stonechat provision rotate ACCOUNT` renews it",
    "CERTIFICATE_REVOKED": "the certificate of --cert is revoked",
    "UNKNOWN_CA": "the broker does not trust the certificate of --cert: is it of this fleet?",
    "CERTIFICATE_REQUIRED": "the broker wants a client certificate: --cert, --key",
    "BAD_CERTIFICATE": "the broker refuses the certificate of --cert",
    "CERTIFICATE_UNKNOWN": "the broker refuses the certificate of --cert",
}


def certificate_alert(error: BaseException | None) -> str:
    """What the broker said of our certificate, "" where the error is none about it."""
    reason = (isinstance(error, ssl.SSLError) and error.reason) or ""
    return next((text for word, text in _ALERTS.items() if word in reason), "")


def lost(host: str, port: int) -> str:
    """For a connection that the broker has ended without a reason: mosquitto 2.0.11 gives none to whom it replaces."""
    return f"broker {host}:{port}: connection lost; a second client of the same account makes the broker do so, too"


def unanswered(host: str, port: int, tls: bool) -> str:
    """For a broker that ends the connection before it has answered the log-in."""
    why = "does it want a client certificate (--cert, --key)?" if tls else "does this port want TLS (without --plain)?"
    return f"broker {host}:{port}: closed the connection without an answer; {why}"


def refused(host: str, port: int, reason: Any) -> str:
    return f"broker {host}:{port} refuses the log-in: {reason}; see --user, --password-file, --cert"
