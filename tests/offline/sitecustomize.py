"""On PYTHONPATH, refuses every socket of the process that would leave the machine."""

import socket

_connect = socket.socket.connect
_resolve = socket.getaddrinfo
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
        raise OSError(f"blocked: a connection to {address}")
    return _connect(self, address)


def getaddrinfo(host, *arguments, **options):
    if host not in (*LOOPBACK, None):
        raise socket.gaierror(f"blocked: a look-up of {host}")
    return _resolve(host, *arguments, **options)


socket.socket.connect = connect
socket.getaddrinfo = getaddrinfo
