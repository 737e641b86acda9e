"""Restrict Ray to the loopback interface, for a local stack.

Ray replaces 127.0.0.1 by the machine's own address and listens on every interface, except on
platforms where it does not support clusters (macOS). One private switch of Ray 2.60 decides that:
an environment variable for the processes that Ray starts, and for this process a constant set from
it at import. tests/security/test_listeners.py checks the addresses that are listened on.
"""

from __future__ import annotations

import logging
import os
from ipaddress import ip_address

from ray._private import ray_constants, services
from ray._private.authentication import authentication_token_setup as tokens


def start_on_loopback() -> None:
    """Make the next Ray that this process starts listen on loopback only."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def find_ray(address: str) -> str:
    """Resolve `address` for `ray.init`.

    For a cluster on loopback, also make this process connect over loopback and authenticate with
    the user's token. Raises ConnectionError if there is no cluster.
    """
    found: str = services.get_ray_address_from_environment(address, None)
    if _is_loopback(found.rpartition(":")[0]):
        ray_constants.ENABLE_RAY_CLUSTER = False
        # Ray does the same for a local cluster, with a warning.
        tokens.logger.setLevel(logging.ERROR)
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
