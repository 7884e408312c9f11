"""The sizes that both ends of the wire keep to: stonechat.cddl, the agent on every device, and the collector.

A board spells them out where it needs them, to save memory; a test compares all of them. Bytes are those of UTF-8."""

REPORT_BYTES = 512  # a sealed report, acknowledgement or command
STATUS_BYTES = 1536  # a sealed status
DEVICE_ID_BYTES = 64
FIRMWARE_BYTES = 64
AGENT_BYTES = 32  # the agent's version
DIGEST_BYTES = 32  # ids of model and schema
STREAM_BYTES = 4
SOURCES = 16  # in a status
SOURCE_BYTES = 40  # of one source: its group, a space, what it reads
DETAIL_BYTES = 256
FEATURES_BYTES = 24
CHANNELS = 12  # beside the device's own: services, the product's counters, lasting peers, sent to peers, its own model
CHANNEL_BYTES = 24  # of one's name
CHUNK_BYTES = 384  # of a release, in one message
CAUSES = 16  # for which windows were not scored
ACK_NUMBERS = 32  # in each list of an acknowledgement: 16 ranges
