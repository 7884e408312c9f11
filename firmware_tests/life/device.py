"""A board's whole life in a few seconds, on MicroPython: boot, hook, learn, score, alarm, publish, lose the broker,
reset, resume. Time is virtual; the broker and the peers are real.

    micropython device.py FOLDER MODEL PORT BROKER_PORT PROFILE PHASE [CA.der]

PROFILE full or core, as it was built. PHASE first: learn, live, be infected, alarm. PHASE again: after a reset, which
must not learn again. Between windows it prints facts, a line each, and waits for a line on standard input where the
test has something to do to the broker.
"""

import sys

KEY = bytes(range(32))


def main(arguments):
    from stonechat.board import hooks

    counter = hooks.install()
    import gc

    gc.threshold(1024)  # type: ignore[attr-defined]  # what lives long lies together then
    import socket
    from time import sleep_ms  # type: ignore[attr-defined]

    from stonechat_tools.lab.firmware.sensor import WINDOW_MS, Firmware

    folder, model, port, broker_port, profile, phase = arguments[:6]
    if profile == "core":
        from stonechat.board import core as entry
    else:
        from stonechat.board import full as entry  # type: ignore[no-redef]
    tls = None
    if len(arguments) > 6:
        from stonechat.board.tls import tls_context

        with open(arguments[6], "rb") as file:
            tls = tls_context(file.read())
    firmware = Firmware(socket, int(port), 42)
    for name in list(sys.modules):  # all modules are linked into the entry and the parts that it has loaded
        if name.startswith("stonechat.") and hasattr(sys.modules[name], "ticks_ms"):
            setattr(sys.modules[name], "ticks_ms", lambda: firmware.now_ms)  # noqa: B010
    watch = entry.start(
        "sensor-7",
        KEY,
        model,
        host="localhost",
        port=int(broker_port),
        tls=tls,
        folder=folder,
        firmware="1.0" if phase != "new" else "1.1",
        keepalive_s=7200,  # of virtual time
        heartbeat_windows=6,
    )
    gc.collect()
    print("started learning %d heap %d" % (watch.agent.learning, _used(gc)))

    def live(windows, stop=None):
        """N windows, or until stop(verdict) -> how many passed."""
        passed = 0
        turns = 0
        while passed < windows:
            firmware.turn()
            verdict = watch.tick()
            turns += 1
            if turns > 12 * windows + 30:
                raise OSError("the agent makes no windows: %s" % watch.agent.last_error)
            if verdict is not None:
                passed += 1
                if stop is not None and stop(verdict):
                    break
        return passed

    def settle():
        """Let the broker take what waits."""
        for _ in range(300):
            watch.tick()
            if watch.transport.connected and not watch.transport.in_flight and not watch.agent.offline:
                break
            sleep_ms(10)

    settle()
    print("connected %d" % watch.transport.connected)
    if phase == "first":
        print("learned_after %d" % (live(400, lambda verdict: not verdict.learning)))
        highest = [0]

        def note(verdict):
            highest[0] = max(highest[0], verdict.level)

        live(60, note)
        print("benign_levels %d" % highest[0])
        firmware.infection = "telnet_scan"
        print("alarm_after %d" % live(12, lambda verdict: verdict.level == 2))
        settle()
        print("published %d" % watch.agent.reporter.published)
        firmware.infection = None
        print("kill the broker")
        sys.stdin.readline()
        live(30)
        print("offline %d connected %d" % (bool(watch.agent.offline), watch.transport.connected))
        print("start the broker")
        sys.stdin.readline()
        for _ in range(4000):
            watch.tick()
            if watch.transport.connected:
                break
            firmware.now_ms += 50  # for the back-off
            sleep_ms(10)
        firmware.now_ms += 2500
        settle()
        print("again connected %d" % watch.transport.connected)
        live(20)
        settle()
    else:
        live(20)
        settle()
    watch.save()
    gc.collect()
    print(
        "windows %d errors %d published %d" % (watch.agent.windows, watch.agent.errors, watch.agent.reporter.published)
    )
    print("last_error %s / %s / window %d" % (watch.agent.last_error, watch.last_error, WINDOW_MS))
    print("learning %d peers %d heap %d" % (watch.agent.learning, len(counter.known), _used(gc)))
    firmware.close()


def _used(gc):
    return gc.mem_alloc() if hasattr(gc, "mem_alloc") else 0


if __name__ == "__main__":
    main(sys.argv[1:])
