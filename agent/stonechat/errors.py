"""The error tree. Whoever calls the agent catches StonechatError; each message carries the facts.

StonechatError
    ConfigError       a configuration key or file is missing, unknown or out of range
    CollectorError    a source of counters failed to start or to read
    FeatureError      a vector's length or schema is not the one expected
    ModelError        a .tflite file or its metadata is malformed, unsupported or not for this device
    StateError        the saved state can't be read or written
    WireError         a CBOR or COSE message is malformed, forged or replayed
    OutboxError       the store-and-forward ring can't be read or written
    MQTTError         the broker refused, broke the protocol or did not answer in time
"""


class StonechatError(Exception):
    pass


def _kind(name):
    return type(name, (StonechatError,), {})


# Made by type(): a class statement would cost a board twice the bytes. errors.pyi says it to the type checkers.
ConfigError = _kind("ConfigError")
CollectorError = _kind("CollectorError")
FeatureError = _kind("FeatureError")
ModelError = _kind("ModelError")
StateError = _kind("StateError")
WireError = _kind("WireError")
OutboxError = _kind("OutboxError")
MQTTError = _kind("MQTTError")
