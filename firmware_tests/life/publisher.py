"""Publishes COUNT numbered messages at QoS 1 through mqtt.Client, on any runtime, and checks every packet id:

    publisher.py PORT COUNT FIRST_ID TOPIC [CA.der]

Ends when the broker has acknowledged the last one; prints how many it handed over and how often it connected.
"""

import sys

from stonechat.board.tls import tls_context
from stonechat.errors import MQTTError
from stonechat.mqtt import Client


def main(arguments):
    port, count, first_id = [int(word) for word in arguments[:3]]
    topic = arguments[3]
    tls = None
    if len(arguments) > 4:
        with open(arguments[4], "rb") as file:
            tls = tls_context(file.read())
    connections = [0]

    def connected():
        connections[0] += 1

    client = Client("publisher-" + topic, "localhost", port, tls=tls, max_in_flight=16)
    client.on_connect = connected  # type: ignore[assignment]
    client._id = first_id - 1
    client.connect()
    client.poll()
    done = 0
    illegal = 0
    while done < count or client.in_flight:
        try:
            client.poll(0.01 if len(client.in_flight) >= 16 or done == count else 0)
        except (MQTTError, OSError) as error:
            print("lost: %s" % error)
        while done < count and client.connected and len(client.in_flight) < 16:
            try:
                client.publish(topic, b"%d" % done, 1)
            except MQTTError:
                break
            number = client.in_flight[-1][0]
            if number == b"\x00\x00" or [entry[0] for entry in client.in_flight].count(number) != 1:
                illegal += 1
            done += 1
    client.close()
    print("published %d connections %d illegal %d last_id %d" % (done, connections[0], illegal, client._id))


if __name__ == "__main__":
    main(sys.argv[1:])
