"""TLS on a board: the broker is verified, which the stock context does not do by itself.

Set the clock first (ntptime), or no certificate is valid yet. An ESP8266 can't verify at all: there the reports' own
authentication is the only protection.
"""


def tls_context(ca, certificate=None, key=None):
    """ca: the authority's certificate, DER bytes; certificate, key: the device's own, DER too, where the broker asks
    for one. -> an SSLContext for mqtt.Client. Raises ValueError or OSError for what can't be read."""
    try:
        import tls
    except ImportError:
        return _context_of_cpython(ca)
    context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    context.verify_mode = tls.CERT_REQUIRED  # pyright: ignore[reportAttributeAccessIssue]  # the stubs lack it
    context.load_verify_locations(ca)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _context_of_cpython(ca):
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=bytes(ca))
    return context
