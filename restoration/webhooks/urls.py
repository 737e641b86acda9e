"""Where a webhook may go: the URL when it is submitted, and an address when it is sent. Pure.

The grammar is narrower than RFC 3986's, so that no two parsers can read a URL differently. Nobody
is asked what a name resolves to: whoever connects does that, and shows each address to `permits`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from restoration.errors import InvalidWebhook
from restoration.webhooks.public_addresses import is_public

MAX_URL_CHARS = 2048
# Those of HTTP: on another, a request could be meant for something that receives no webhooks.
PUBLIC_PORTS = (80, 443, 8080, 8443)

_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]+\])"
    r"(:(?P<port>[0-9]{1,5}))?"
    # no user before the host, no fragment, and nothing that some parsers take for a slash
    r"([/?][a-z0-9/?:@!$&'()*+,;=._~%-]*)?",
    re.ASCII | re.IGNORECASE,
)
# Names that lead nowhere but home, whatever the resolver says (RFC 6761, RFC 6762, ICANN).
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """`allow_http` is for development; addresses in `networks` may be reached on any port."""

    enabled: bool = False
    allow_http: bool = False
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def permits(self, address: str, port: int) -> bool:
        """Whether a webhook may be sent to this IP address. Raises ValueError if it is none."""
        found = ip_address(address)
        if any(found in network for network in self.networks):
            return True
        return port in PUBLIC_PORTS and is_public(found)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads: `host` in lower case, an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int


def check_url(url: str, rules: WebhookRules) -> Target:
    """Raise InvalidWebhook unless a webhook may be sent to `url`, as far as its text tells."""
    if not rules.enabled:
        raise InvalidWebhook("this service sends no webhooks: WEBHOOK_SECRET is not set")
    if (target := _read(url)) is None:
        raise InvalidWebhook(
            "webhook_url must read like https://example.com/path: ASCII, without user or fragment, "
            f"of at most {MAX_URL_CHARS} characters"
        )
    if target.scheme != "https" and not rules.allow_http:
        raise InvalidWebhook("webhook_url must begin with https://")
    if target.port not in PUBLIC_PORTS and not rules.networks:
        raise InvalidWebhook(f"the port of webhook_url must be one of {PUBLIC_PORTS}")
    if not _may_be_reached(target, rules):
        raise InvalidWebhook("the host of webhook_url must be public")
    return target


def host_of(url: str) -> str:
    """The host of a URL that `check_url` let pass."""
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
    try:
        return rules.permits(target.host, target.port)
    except ValueError:
        return _may_be_resolved(target.host, rules)


def _may_be_resolved(name: str, rules: WebhookRules) -> bool:
    # A resolver takes 127.1, 0x7f.1 and 2130706433 for addresses: no top-level domain is a number.
    if not name.rpartition(".")[2][:1].isalpha():
        return False
    if rules.networks:  # a name of one's own may lead there
        return True
    return "." in name and not f".{name}".endswith(_PRIVATE_SUFFIXES)
