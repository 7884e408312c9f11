"""TLS with a peer that resets the connection, with and without the hook: tls_reset.py PORT CA.der [hook]

The peer (test_life.py) goes through its stages, one a connection: it resets at once, after the first message of the
handshake, after the handshake, and in the middle of an answer. Prints what every call of the firmware gave, and
whether handshakes that fail leave memory behind.
"""

import gc
import sys
import time

mem_alloc = getattr(gc, "mem_alloc", int)
STAGES = 4
AGAIN = 12  # handshakes that are reset, to see what each leaves


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
    import select
    import socket

    import tls

    with open(arguments[1], "rb") as file:
        authority = file.read()
    context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    context.verify_mode = tls.CERT_REQUIRED
    context.load_verify_locations(authority)
    address = socket.getaddrinfo("127.0.0.1", port)[0][-1]

    def connected():
        plain = socket.socket()
        plain.connect(address)
        return plain

    def wait(plain):
        """Until the peer has reset the connection, whatever it sent before."""
        poll = select.poll()
        poll.register(plain, select.POLLIN)
        for _ in range(500):
            for _, flags in poll.poll(10):
                if flags & select.POLLHUP:
                    return True
            time.sleep(0.01)
        return False

    def use(stream):
        buffer = bytearray(8)
        return [
            told(call)
            for call in (
                lambda: stream.write(b"question\n"),
                lambda: stream.read(4),
                lambda: stream.read(4),
                lambda: stream.write(bytearray(9)),
                lambda: stream.readinto(buffer),
                lambda: stream.write(b"again\n"),
                stream.readline,
                stream.close,
                stream.close,
                lambda: stream.read(1),
            )
        ]

    def blocking(wait_first):
        plain = connected()
        if wait_first:
            wait(plain)
        stream = context.wrap_socket(plain, server_hostname="localhost")
        stream.write(b"first\n")
        return wait(plain), use(stream), told(lambda: plain.send(b"x")), told(plain.close)

    def stepwise(wait_first):
        """The handshake in steps, as asyncio makes it."""
        plain = connected()
        if wait_first:
            wait(plain)
        plain.setblocking(False)
        stream = context.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
        poll = select.poll()
        poll.register(stream, select.POLLIN | select.POLLOUT)
        got = None
        for _ in range(200):
            poll.poll(100)
            got = told(lambda: stream.write(b"first\n"))
            if got is not None:
                break
        wait(plain)
        return got, use(stream)

    for stage in range(STAGES):
        print("blocking", stage, told(lambda stage=stage: blocking(stage == 0)))
    for stage in range(STAGES):
        print("stepwise", stage, told(lambda stage=stage: stepwise(stage == 0)))
    gc.collect()
    before = mem_alloc()
    for _ in range(AGAIN):
        told(lambda: blocking(True))
    gc.collect()
    print("leaked", (mem_alloc() - before) // 2048)
    if counter is not None:
        assert counter.counts[2] > 0, counter.counts  # conn_refused: a reset counts there


if __name__ == "__main__":
    main(sys.argv[1:])
