"""What the agent costs on this interpreter: measure.py MODEL FOLDER PROFILE all | live | guard | tls [PORT CA.der]

PROFILE is full or core. all prints `name value` lines: bytes of heap, bytes allocated per call and microseconds per
call. live only starts the agent with its MQTT client and ends ten windows, to find the least heap in which that works.
guard prints what a call costs before the guard of a response was ever there, after a lease has ended, and, to a known
peer, while one is in force. tls prints what a TLS connection to PORT takes of the heap. MicroPython only.
"""

import gc
import sys

TURNS = 40
ROUNDS = 25
mem_alloc = getattr(gc, "mem_alloc", int)


def main(arguments):
    model, folder, profile, mode = arguments[:4]
    if mode == "tls":
        tls_connection(int(arguments[4]), arguments[5])
        return
    if mode == "guard":
        guarded_calls()
        return
    gc.collect()
    bare = mem_alloc()
    from stonechat.board import hooks

    hooks.install()
    gc.collect()
    hook = mem_alloc() - bare
    package = __import__("stonechat.board." + ("core" if profile == "core" else "full"))
    start = getattr(package.board, "core" if profile == "core" else "full").start

    gc.collect()
    imported = mem_alloc() - bare

    def publish(topic, payload, qos, retain):
        pass

    watch = start("sensor-7", bytes(32), model, host="127.0.0.1", port=9, folder=folder, heartbeat_windows=5)
    watch.agent.publish = publish
    gc.collect()
    steady = mem_alloc() - bare
    agent = watch.agent
    now_ms = 0
    for _ in range(10):
        now_ms += agent.window_ms
        agent.end_window(now_ms)
    if mode == "live":
        print("windows %d" % agent.windows)
        return
    print("heap_hook %d" % hook)
    print("heap_import %d" % imported)
    print("heap_steady %d" % steady)
    stage = agent.channels[0]
    head = stage.scorer
    reporter = agent.reporter
    values = stage.values
    clock = [now_ms]

    def window():
        clock[0] += agent.window_ms
        stage.window.push(values, clock[0])

    def fill():
        head.normalization.fill_q8(stage.window.deltas, agent.window_ms, agent.window_ms, f_q8)
        head.normalization.fill(f_q8, x)

    f_q8 = [0] * len(values)
    x = bytearray(len(values))
    y = bytes(len(values))
    reporter.heartbeat_windows = 1
    if profile != "core":
        reporter.budget.limited = False

    def whole():
        clock[0] += agent.window_ms
        agent.end_window(clock[0])

    level = [0]

    def report():
        """Made, sent, and in the full profile acknowledged."""
        head.verdict.level = level[0]
        clock[0] += agent.window_ms
        reporter.observe(head.verdict, clock[0])
        reporter.pump(publish, clock[0])
        if profile != "core":
            reporter.outbox.ack(0, reporter.sequence, reporter.stream)

    def alarm():
        level[0] = 2
        report()

    stages = (
        ("tick_idle", watch.tick),
        ("collector_read", lambda: stage.collector.read(values)),
        ("window_push", window),
        ("features", fill),
        ("inference", lambda: head.model.run(x)),
        ("detection", lambda: head.detector.weigh(head.detector.surprise(head.detector.score(x, y)))),
        ("report", report),
        ("report_alarm", alarm),
        ("window_whole", whole),
    )
    for name, call in stages:
        print("%s %s" % (name, cost(call)))
    hooked_calls(hooks)


def tls_connection(port, authority):
    """The context, the connection and what the handshake leaves, as mqtt.Client would hold them."""
    import socket

    from stonechat.board.tls import tls_context

    gc.collect()
    before = mem_alloc()
    with open(authority, "rb") as file:
        context = tls_context(file.read())
    stream = socket.socket()
    stream.connect(socket.getaddrinfo("127.0.0.1", port)[0][-1])
    secure = context.wrap_socket(stream, server_hostname="localhost")
    secure.write(b"hello")
    secure.read(5)
    most = mem_alloc() - before
    gc.collect()
    print("heap_tls %d" % (mem_alloc() - before))
    print("heap_tls_handshake %d" % most)


def cost(call):
    """-> "bytes microseconds": allocated per call, and the least time of a call in three rounds."""
    from stonechat.compat import ticks_diff, ticks_us

    call()
    least_us = 1 << 29
    for _ in range(3):
        gc.collect()
        gc.disable()
        before = mem_alloc()
        start_us = ticks_us()
        for _ in range(TURNS):
            call()
        took_us = ticks_diff(ticks_us(), start_us)
        taken = mem_alloc() - before
        gc.enable()
        least_us = min(least_us, took_us)
    return "%d %d.%02d" % (taken // TURNS, least_us // TURNS, least_us * 100 // TURNS % 100)


def hooked_calls(hooks):
    """What the hook adds to a sendto and to an open."""
    for name in ("bare", "hooked"):
        if name == "hooked":
            hooks.install()
        else:
            hooks.remove()
        import socket

        print("sendto_%s %s" % (name, cost(_sender(socket))))


def guarded_calls():
    from stonechat.board import hooks

    counter = hooks.install()
    import socket

    send = _sender(socket)
    before = [cost(send) for _ in range(ROUNDS)]
    from stonechat.board import guard
    from stonechat.policy import QUARANTINE

    one = guard.Guard()
    one.apply(QUARANTINE, 60)
    one.release()
    after = [cost(send) for _ in range(ROUNDS)]
    counter.known[counter.meet(socket.getaddrinfo("127.0.0.1", 9)[0][-1])[0]] = 0
    one.apply(QUARANTINE, 60)
    within = [cost(send) for _ in range(ROUNDS)]
    one.release()
    for name, costs in (("hooked", before), ("guard_off", after), ("guard_on", within)):
        words = [line.split() for line in costs]
        print("sendto_%s %s %.2f" % (name, words[-1][0], min([float(word[1]) for word in words])))


def _sender(socket):
    stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    address = socket.getaddrinfo("127.0.0.1", 9)[0][-1]

    def send():
        try:
            stream.sendto(b"x", address)
        except OSError:  # nobody listens there, which the kernel reports every other time
            pass

    return send


if __name__ == "__main__":
    main(sys.argv[1:])
