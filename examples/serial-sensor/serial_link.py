# Reports over a UART, for a board without a network. One message is one line of text, so the firmware may print to the
# same port: "SC report BASE64 CRC32\n". It takes 4 bytes for 3; a line that was damaged is dropped at the other end.
from binascii import a2b_base64, b2a_base64, crc32

LONGEST = 512  # bytes of a line


def line(kind, payload):
    name = kind.encode()
    return b"SC %s %s %08x\n" % (name, b2a_base64(payload).strip(), crc32(payload, crc32(name)) & 0xFFFFFFFF)


def parse(text):
    """One line, without its end -> (kind, payload); None where it is none of ours, or damaged."""
    words = bytes(text).split()
    if len(words) != 4 or words[0] != b"SC":
        return None
    try:
        payload = a2b_base64(words[2])
        if b"%08x" % (crc32(payload, crc32(words[1])) & 0xFFFFFFFF) == words[3]:
            return words[1].decode(), payload
    except ValueError:
        pass
    return None


class SerialLink:
    """uart: has write(bytes) and read(n), which returns None or b"" at once where nothing has come (timeout=0)."""

    def __init__(self, uart):
        self.uart = uart
        self.damaged = 0
        self._text = b""

    def publish(self, topic, payload, qos, retain):
        """For start(publish=...). Raises OSError where the UART has not taken it all: the agent sends it again."""
        text = line(topic.rsplit("/", 1)[1], payload)
        if self.uart.write(text) != len(text):
            raise OSError("the UART is full")

    def poll(self, agent):
        """Hands what has come (acknowledgements, commands) to the agent."""
        self._text += self.uart.read(64) or b""
        while b"\n" in self._text:
            text, self._text = self._text.split(b"\n", 1)
            got = parse(text)
            if got is None:
                self.damaged += 1
                continue
            for topic in agent.reporter.subscriptions:
                if topic.rsplit("/", 1)[1] == got[0]:
                    agent.on_message(topic, got[1])
        if len(self._text) > LONGEST:
            self._text = b""
            self.damaged += 1
