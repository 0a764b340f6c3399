"""The port, which is taken before anything heavy is imported or loaded."""

import socket

BACKLOG = 2048


def take_port(host: str, port: int) -> socket.socket:
    """A listening socket. Taken before the weights load, so that a second server on the port fails at once; clients
    that come meanwhile wait. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named. With it an event of a stream may wait 40 ms.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return taken
