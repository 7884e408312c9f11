"""The project's own MQTT client on Linux, where no name look-up may stop the loop."""

import _socket
import os

from ..errors import MQTTError
from ..mqtt import Client
from .resolver import Resolver, RoundBackoff


class OwnClient(Client):
    """mqtt.Client with a Resolver for its `socket`: no call of poll() waits longer than its wait_s."""

    _net: Resolver
    _backoff: RoundBackoff

    def __init__(self, client_id: str, host: str, port: int, *, resolver: Resolver | None = None, **options) -> None:
        if resolver is None:
            import socket

            resolver = Resolver(host, port, socket)
        Client.__init__(self, client_id, host, port, socket=resolver, **options)
        self._backoff = RoundBackoff(resolver)
        self._where = (resolver.host,) + self._where[1:]  # bytes: ssl would load the idna codec for a text

    def poll(self, wait_s: float = 0) -> None:
        if not self._socket and not (self._backoff.due() and self._net.ready()):
            return
        was_connected = self.connected
        try:
            Client.poll(self, wait_s)
        except (OSError, MQTTError):
            if self._socket or was_connected or not self._backoff.silent:
                raise  # else the next address is tried first
        except ValueError as error:  # of ssl, for a stream that has ended meanwhile
            self._backoff.failed()
            self._drop()
            raise MQTTError(str(error))

    def _welcome(self, code) -> None:
        self.refused = 0  # of this connection
        Client._welcome(self, code)
        self._info = None  # the Resolver knows the address that worked

    def _open(self, stream) -> None:
        code = stream.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if code:  # before ssl wraps it: that makes a ValueError of it
            raise OSError(code, os.strerror(code))
        Client._open(self, stream)
