"""Check the URL of a webhook at submission, and the IP address when it is sent. No I/O.

The grammar is narrower than RFC 3986's, so that no two parsers can read a URL differently. Names
are not resolved here: the sender resolves them and checks each address with `permits`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from restoration.errors import InvalidWebhook
from restoration.webhooks.public_addresses import is_public

MAX_URL_CHARS = 2048
# Only HTTP's usual ports, so that a webhook cannot be aimed at another kind of service.
PUBLIC_PORTS = (80, 443, 8080, 8443)

_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]+\])"
    r"(:(?P<port>[0-9]{1,5}))?"
    # no user before the host, no fragment, and no backslash, which some parsers read as a slash
    r"([/?][a-z0-9/?:@!$&'()*+,;=._~%-]*)?",
    re.ASCII | re.IGNORECASE,
)
# Names reserved for private use, even if a resolver answers for them (RFC 6761, RFC 6762, ICANN).
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """Rules for destinations.

    `allow_http` is for development. Addresses in `networks` are permitted on any port.
    """

    enabled: bool = False
    allow_http: bool = False
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def permits(self, address: str, port: int) -> bool:
        """Return whether a webhook may be sent to `address`. Raises ValueError if it is no IP."""
        found = ip_address(address)
        if any(found in network for network in self.networks):
            return True
        return port in PUBLIC_PORTS and is_public(found)


@dataclass(frozen=True, slots=True)
class Target:
    """Destination of a URL. `host` is in lower case, and an IPv6 address has no brackets."""

    scheme: str
    host: str
    port: int


def check_url(url: str, rules: WebhookRules) -> Target:
    """Return the destination of `url`. Raises InvalidWebhook if the rules forbid it.

    A name passes without being resolved.
    """
    if not rules.enabled:
        raise InvalidWebhook("webhooks are disabled: the service has no WEBHOOK_SECRET")
    if (target := _read(url)) is None:
        raise InvalidWebhook(
            "webhook_url must be a URL like https://example.com/path: only ASCII "
            f"characters, no user name, no fragment, at most {MAX_URL_CHARS} characters"
        )
    if target.scheme != "https" and not rules.allow_http:
        raise InvalidWebhook("webhook_url must start with https://")
    if target.port not in PUBLIC_PORTS and not rules.networks:
        raise InvalidWebhook(f"the port of webhook_url must be one of {PUBLIC_PORTS}")
    if not _may_be_reached(target, rules):
        raise InvalidWebhook("the host of webhook_url must have a public address")
    return target


def host_of(url: str) -> str:
    """Return the host of a URL that `check_url` has accepted."""
    target = _read(url)
    return target.host if target else ""


def _read(url: str) -> Target | None:
    parts = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if parts is None:
        return None
    scheme = parts["scheme"].lower()
    port = int(parts["port"] or (443 if scheme == "https" else 80))
    return Target(scheme, parts["host"].lower().strip("[]"), port) if 0 < port < 65536 else None


def _may_be_reached(target: Target, rules: WebhookRules) -> bool:
    with suppress(ValueError):  # it is a name
        return rules.permits(target.host, target.port)
    # Resolvers read 127.1, 0x7f.1 and 2130706433 as addresses. No top-level domain begins with a
    # digit.
    if not target.host.rpartition(".")[2][:1].isalpha():
        return False
    if rules.networks:  # an internal name may resolve to an address in them
        return True
    return "." in target.host and not f".{target.host}".endswith(_PRIVATE_SUFFIXES)
