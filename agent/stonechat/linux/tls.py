"""TLS on Linux: the broker is verified, always."""

import ssl

from ..errors import ConfigError
from .files import check_private, read_regular


def tls_context(ca_file: str = "", cert_file: str = "", key_file: str = "", alpn: str = "") -> ssl.SSLContext:
    """A context of TLS 1.2 or later that verifies the broker. Empty ca_file: the system's authorities. Raises
    ConfigError naming the file that can't be used."""
    for name, path in (("ca_file", ca_file), ("cert_file", cert_file), ("cert_key_file", cert_file and key_file)):
        if path:
            _, mode = read_regular(path, 1, "[mqtt] " + name)  # OpenSSL would wait for a FIFO
            if name == "cert_key_file" or name == "cert_file" and not key_file:  # then the key is in it
                check_private(path, mode, "[mqtt] " + name)
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ValueError) as error:
        raise ConfigError("[mqtt] ca_file %s: %s" % (ca_file, error))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:

        def encrypted() -> str:  # OpenSSL would ask whoever sits at the terminal
            text = "[mqtt] cert_key_file %s is encrypted, and nobody types its pass phrase here: store it without one"
            raise ConfigError(text % (key_file or cert_file))

        try:
            context.load_cert_chain(cert_file, key_file or None, encrypted)
        except (OSError, ValueError) as error:
            raise ConfigError("[mqtt] cert_file %s, cert_key_file %s: %s" % (cert_file, key_file, error))
    if alpn:
        try:
            context.set_alpn_protocols([alpn])
        except (OSError, ValueError) as error:
            raise ConfigError("[mqtt] alpn %s: %s" % (alpn, error))
    return context
