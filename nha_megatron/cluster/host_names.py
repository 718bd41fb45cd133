"""Do the names by which nodes meet resolve? `python -m nha_megatron.cluster.host_names ADDRESS...`, from the launch scripts.

A rank tells the others the name of its host, and they look it up: one that does not resolve keeps all of them waiting until a timeout
of many minutes, or for ever.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from nha_megatron.config.errors import ConfigError
from nha_megatron.engine.environment import require_resolves
from nha_megatron.exit_status import COMPLETE, USER_ERROR

OWN_NAME = "--own-name"


def host_of(endpoint: str) -> str:
    """`n1` of `n1:29400`, `::1` of `[::1]:29400` and of `::1`."""
    host, colon, port = endpoint.rpartition(":")
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return host if colon and port.isdecimal() and ":" not in host else endpoint


def main(words: Sequence[str]) -> int:
    try:
        for word in words:
            if word == OWN_NAME:  # the one that torchrun announces
                remedy = "add it to DNS or /etc/hosts of all nodes, or set LOCAL_ADDR to an address of this node that the others reach"
                require_resolves(socket.getfqdn(), "the name of this host,", remedy)
            else:
                name, _, address = word.partition("=")
                require_resolves(host_of(address), name, "give a name that DNS or /etc/hosts knows, or an address")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
