"""A client of NBD, the network block device protocol, small and distrustful of its server.

It speaks what doc/proto.md of the NBD project (https://github.com/NetworkBlockDevice/nbd) calls the
fixed newstyle handshake, with structured replies and block status where the server has them.  It
has no TLS.  libnbd's Python binding would do as well, but comes with few distributions' Python and
not from PyPI.
"""

from .storage import NbdStorage

__all__ = ["NbdStorage"]
