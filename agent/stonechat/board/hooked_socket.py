"""The module that `import socket` gives while the hook is in place: hooks.install() puts the names of socket into it.
It is a file because only a file makes a module object, and `from socket import *` on MicroPython 1.25 to 1.27 reads
whatever is in sys.modules as one."""
