"""The same TLS conversation with and without the hook, on MicroPython: tls_client.py PORT CA.der [hook]

Prints what the firmware got: bytes and exceptions, blocking, non-blocking and under asyncio.
"""

import sys


def told(call):
    try:
        return call()
    except Exception as error:
        return type(error), error.args


def main(arguments):
    port = int(arguments[0])
    counter = None
    if len(arguments) > 2:
        from stonechat.board import hooks

        counter = hooks.install()
    import asyncio
    import socket

    import tls

    with open(arguments[1], "rb") as file:
        authority = file.read()

    def context(verified=True):
        one = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
        one.verify_mode = tls.CERT_REQUIRED
        one.load_verify_locations(authority if verified else other)
        return one

    with open(arguments[1][:-6] + "other.der", "rb") as file:
        other = file.read()
    address = socket.getaddrinfo("127.0.0.1", port)[0][-1]

    def ask(verified, name, blocking):
        plain = socket.socket()
        plain.connect(address)
        stream = context(verified).wrap_socket(plain, server_hostname=name)
        stream.setblocking(blocking)
        first = stream.read(1) if not blocking else None
        stream.write(b"question\n")
        stream.setblocking(True)
        answer = stream.read()
        stream.close()
        return first, answer

    print(told(lambda: ask(True, "localhost", True)))
    print(told(lambda: ask(True, "localhost", False)))
    print(told(lambda: ask(True, "elsewhere", True)))
    print(told(lambda: ask(False, "localhost", True)))

    async def task():
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context(), server_hostname="localhost")
        writer.write(b"question\n")
        await writer.drain()
        answer = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return answer

    print(told(lambda: asyncio.run(task())))
    if counter is not None:
        assert counter.counts[1] == 5, counter.counts
        assert counter.counts[13] > 10000, counter.counts


if __name__ == "__main__":
    main(sys.argv[1:])
