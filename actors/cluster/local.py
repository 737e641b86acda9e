"""Ray on loopback alone, as a local stack has it.

Ray replaces 127.0.0.1 by the machine's own address, and listens on every interface, unless it
takes its platform for one without clusters (macOS). That is one switch: a variable for the
processes that Ray starts, and for this one a constant, made of it at import. Both are Ray's own,
2.60's: what listens where is held to by tests/security/test_listeners.py.
"""

from __future__ import annotations

import logging
import os
from ipaddress import ip_address

from ray._private import ray_constants, services
from ray._private.authentication import authentication_token_setup as tokens


def start_on_loopback() -> None:
    """The Ray that this process starts next listens on loopback alone."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def find_ray(address: str) -> str:
    """What `ray.init` takes for `address`; if it is on loopback, this process looks there for it,
    and shows this user's token.

    Raises ConnectionError when there is no cluster.
    """
    found: str = services.get_ray_address_from_environment(address, None)
    if _is_loopback(found.rpartition(":")[0]):
        ray_constants.ENABLE_RAY_CLUSTER = False
        _show_token()
    return found


def _show_token() -> None:
    """As Ray does, with a warning, where it finds a local cluster by itself."""
    tokens.logger.setLevel(logging.ERROR)
    tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
