"""Why the broker can't be reached, in one plain line with the fix, the same for both transports."""

import errno

# CONNACK return codes (MQTT 3.1.1, table 3.1)
_REFUSED = {
    "refused, code 1": "the broker does not speak MQTT 3.1.1",
    "refused, code 2": "the broker refuses the device id as a client id",
    "refused, code 3": "the broker is not available",
    "refused, code 4": "wrong user name or password: compare [mqtt] username and password_file with the broker's",
    "refused, code 5": "not authorized: the broker does not know this device, or has revoked it",
    "no answer": "no answer",
}
_ERRNO = {
    errno.ECONNREFUSED: "connection refused: is the broker running, and [mqtt] port right?",
    errno.ETIMEDOUT: "no answer",
    errno.ENETUNREACH: "no route to the broker: is the network up?",
    errno.EHOSTUNREACH: "no route to the broker: is it on, and the network up?",
    errno.ENETDOWN: "the network is down",
}
_CLOSED = "the broker closed the connection; another client with the same device id makes it do so, too"
_UNANSWERED = (
    "the broker closed the connection before it answered: does it ask for a certificate, or refuse this device's?"
)
# Verification results of OpenSSL (openssl/x509_vfy.h)
_UNTRUSTED = (2, 18, 19, 20, 21, 24, 26)
_VERIFY = {
    9: "the broker's certificate is not valid yet: is this device's clock right?",
    10: "the broker's certificate has expired (or this device's clock is wrong)",
    23: "the broker's certificate is revoked",
    62: "wrong host: the broker's certificate is for another name than [mqtt] host",
    64: "wrong host: the broker's certificate is for another address than [mqtt] host",
}
_ALERTS = (  # what the broker says of this device's certificate; a word of OpenSSL's reason, then ours
    ("CERTIFICATE_REVOKED", "the broker has revoked this device's certificate"),
    ("CERTIFICATE_EXPIRED", "this device's certificate has expired: [mqtt] cert_file"),
    ("UNKNOWN_CA", "the broker does not trust this device's certificate: [mqtt] cert_file"),
    ("CERTIFICATE_REQUIRED", "the broker asks for a client certificate: set [mqtt] cert_file and cert_key_file"),
    ("BAD_CERTIFICATE", "the broker refuses this device's certificate: [mqtt] cert_file"),
    ("CERTIFICATE_UNKNOWN", "the broker refuses this device's certificate: [mqtt] cert_file"),
    ("UNSUPPORTED_CERTIFICATE", "the broker refuses this device's certificate: [mqtt] cert_file"),
    ("ACCESS_DENIED", "the broker refuses this device's certificate: [mqtt] cert_file"),
    ("HANDSHAKE_FAILURE", "the TLS handshake failed: no common cipher, or the broker asks for a client certificate"),
    ("WRONG_VERSION_NUMBER", "the broker does not speak TLS on this port: [mqtt] port, or tls = false"),
    ("UNSUPPORTED_PROTOCOL", "the broker offers no TLS 1.2 or later"),
    ("PROTOCOL_VERSION", "the broker offers no TLS 1.2 or later"),
    ("EOF", ""),
)


def explain(error: Exception, was_connected: bool = False) -> str:
    """error: what a transport's poll() raised; was_connected: before that call -> one line."""
    closed = _CLOSED if was_connected else _UNANSWERED
    kind = type(error).__name__
    if kind == "SSLCertVerificationError":
        code = getattr(error, "verify_code", 0)
        if code in _UNTRUSTED:
            return "untrusted: the broker's certificate is not signed by [mqtt] ca_file (%s)" % _verify_words(error)
        return _VERIFY.get(code) or "untrusted: the broker's certificate: " + _verify_words(error)
    if kind.startswith("SSL"):
        reason = "%s %s" % (getattr(error, "reason", None), error)
        for word, text in _ALERTS:
            if word in reason.upper().replace(" ", "_"):
                return text or closed
        return "TLS: %s" % (getattr(error, "reason", None) or error)
    if kind == "gaierror":
        return "name not resolved: %s; check [mqtt] host and this device's DNS" % (error.args[-1],)
    code = getattr(error, "errno", None)
    if code in _ERRNO:
        return _ERRNO[code]
    text = str(error)
    if code in (errno.ECONNRESET, errno.EPIPE) or text == "closed":
        return closed
    return _REFUSED.get(text, text)


def _verify_words(error: Exception) -> str:
    return str(getattr(error, "verify_message", "") or error)
