"""The other end of the wire: takes the lines of a board from a serial port to the MQTT broker, and the answers back.

    stty -F /dev/ttyUSB0 115200 raw -echo
    python forward.py /dev/ttyUSB0 sensor-7 --broker broker.lan:8883 --identity fleet/devices/sensor-7
    python forward.py /dev/ttyUSB0 sensor-7 --broker localhost:1883

The port decides which device speaks, not what comes over the wire: a board can't report as another. The reports are
authenticated by the board's own key, which is not here; --identity has what the broker asks the device for.
"""

import argparse
import os
import ssl
import sys
from pathlib import Path

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from serial_link import LONGEST, line, parse

UP, DOWN = ("report", "status"), ("ack", "command", "model")


def connect(args: argparse.Namespace, wire: int) -> paho.Client:
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=args.device)
    if args.identity:
        tls = ssl.create_default_context(cafile=args.identity / "ca.crt")
        if (args.identity / "client.crt").exists():
            tls.load_cert_chain(args.identity / "client.crt", args.identity / "client.key")
        else:
            client.username_pw_set(args.device, (args.identity / "password").read_text().strip())
        client.tls_set_context(tls)

    def on_connect(*_: object) -> None:
        client.subscribe([(f"{args.topics}/{args.device}/{name}", 1) for name in DOWN])

    def on_message(_client: object, _user: object, message: paho.MQTTMessage) -> None:
        os.write(wire, line(message.topic.rpartition("/")[2], message.payload))

    client.on_connect = on_connect
    client.on_message = on_message
    host, _, port = args.broker.rpartition(":")
    client.connect(host, int(port))
    client.loop_start()
    return client


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", help="the serial port, already set to the board's speed")
    parser.add_argument("device", help="the device's id")
    parser.add_argument("--broker", default="localhost:1883", metavar="HOST:PORT")
    parser.add_argument("--topics", default="stonechat/1/fleet", help="prefix and fleet (default %(default)s)")
    parser.add_argument("--identity", type=Path, help="folder with ca.crt and client.crt, client.key or password")
    args = parser.parse_args()
    wire = os.open(args.port, os.O_RDWR | os.O_NOCTTY)
    client = connect(args, wire)
    text = b""
    while True:
        got = os.read(wire, 256)
        if not got:
            return 0
        *lines, text = (text + got).split(b"\n")
        text = text[-LONGEST:]
        for one in lines:
            found = parse(one)
            if found and found[0] in UP:
                client.publish(f"{args.topics}/{args.device}/{found[0]}", found[1], 1, retain=found[0] == "status")
            else:
                print(one.decode(errors="replace"), file=sys.stderr)  # what the firmware printed


if __name__ == "__main__":
    sys.exit(main())
