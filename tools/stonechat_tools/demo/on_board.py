"""The demo's firmware as it runs on MicroPython: the simulated sensor (lab/firmware/sensor.py) with the agent in its
full profile, whose reports go to a real broker.

    micropython on_board.py DEVICE KEY MODEL PEERS_PORT BROKER_PORT

Its clock is virtual: each turn is a second of the device's life, however long the host takes for it, so what else the
host does changes nothing. It takes commands on standard input and answers each with one line:

    window          live one window, and wait until the collector has its report -> "window LEARNING"
    infect NAME     the infection begins -> "infect NAME"
    recover         it ends -> "recover"
    end             save and leave -> "end REPORTS_PUBLISHED ERRORS"

Anything that goes wrong is one line, "error WHAT".
"""

import sys
import time

_PATIENCE_S = 240  # for the collector's acknowledgement: real time, an overloaded host is slow
_BACK_OFF_MS = 50  # of virtual time that each look at a lost connection takes


def _complete(hooks):
    """CPython's socket has most of its methods from a base class, where the hook, made for boards, does not look."""
    for name in dir(hooks.real_socket.socket):
        if name[0] != "_" and not hasattr(hooks.socket, name):
            place = {"send": hooks._WRITES, "recv": hooks._READS}.get(name[:4])
            setattr(hooks.socket, name, hooks._through(name, place))


def main(arguments):
    from stonechat import compat

    virtual = [0]
    compat.ticks_ms = lambda: virtual[0]  # before anything else takes it from there

    from stonechat.board import hooks

    if sys.implementation.name == "cpython":
        _complete(hooks)
    hooks.install()
    import socket

    from stonechat.board import full

    from stonechat_tools.lab.firmware.sensor import TURN_MS, WINDOW_MS, Firmware

    device, key, model, peers_port, broker_port = arguments
    firmware = Firmware(socket, int(peers_port), 42)
    watch = full.start(
        device,
        bytes([int(key[i : i + 2], 16) for i in range(0, len(key), 2)]),
        model,
        host="127.0.0.1",
        port=int(broker_port),
        fleet="demo",
        folder="data",
        firmware="1.0",
        keepalive_s=7200,  # of virtual time
        heartbeat_windows=1,
        bytes_per_day=100_000_000,
    )

    def turn():
        """One second -> the Verdict of a window that has just ended, else None."""
        firmware.turn()
        virtual[0] = firmware.now_ms
        return watch.tick()

    def deliver():
        """Wait, with the virtual clock stopped, until the collector has every report."""
        outbox = watch.agent.reporter.outbox
        give_up_s = time.time() + _PATIENCE_S
        while outbox.oldest != outbox.sequence:
            watch.tick()
            if not watch.transport.connected:
                firmware.now_ms += _BACK_OFF_MS
                virtual[0] = firmware.now_ms
            if time.time() > give_up_s:
                raise OSError("no acknowledgement: %s %s" % (watch.agent.offline, watch.last_error))
            compat.sleep_ms(1)

    def window():
        for _ in range(4 * WINDOW_MS // TURN_MS):
            if turn() is not None:
                deliver()
                return
        raise OSError("no window ends: %s %s" % (watch.agent.last_error, watch.last_error))

    while True:
        words = sys.stdin.readline().split()
        try:
            if not words or words[0] == "end":
                watch.save()
                firmware.close()
                errors = watch.errors + watch.agent.errors
                print("end %d %d" % (watch.agent.reporter.published, errors))
                return
            if words[0] == "window":
                window()
                print("window %d" % watch.agent.learning)
            elif words[0] == "infect":
                firmware.infection = words[1]
                print("infect %s" % words[1])
            else:
                firmware.infection = None
                print("recover")
        except Exception as error:  # one line for the host, whatever it is
            print("error %r" % error)
            return
        finally:
            if hasattr(sys.stdout, "flush"):
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
