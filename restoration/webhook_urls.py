"""Where a webhook may go: judged by the URL alone, without asking anybody. Pure.

The grammar is narrower than RFC 3986's, so that no two parsers can read a URL differently. What a
name resolves to is not looked at here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from restoration.errors import InvalidWebhook

MAX_URL_CHARS = 2048

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
    """`allow_http` is for development: plain HTTP, and hosts that are not public."""

    enabled: bool = False
    allow_http: bool = False


def check_url(url: str, rules: WebhookRules) -> None:
    """Raise InvalidWebhook unless a webhook may be sent to `url`."""
    if not rules.enabled:
        raise InvalidWebhook("this service sends no webhooks: WEBHOOK_SECRET is not set")
    parts = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if parts is None or not 0 < int(parts["port"] or 443) < 65536:
        raise InvalidWebhook(
            "webhook_url must read like https://example.com/path: ASCII, without user or fragment, "
            f"of at most {MAX_URL_CHARS} characters"
        )
    if rules.allow_http:
        return
    if parts["scheme"].lower() != "https":
        raise InvalidWebhook("webhook_url must begin with https://")
    if not _looks_public(host_of(url)):
        raise InvalidWebhook("the host of webhook_url must be public")


def host_of(url: str) -> str:
    """The host of a URL that `check_url` let pass: lower case, an IPv6 address without brackets."""
    parts = _URL.fullmatch(url)
    return parts["host"].lower().strip("[]") if parts else ""


def _looks_public(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return _is_public_name(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_global and not address.is_multicast


def _is_public_name(host: str) -> bool:
    """A name below a public suffix, as far as its form tells."""
    # A resolver takes 127.1, 0x7f.1 and 2130706433 for addresses: no top-level domain is a number.
    top_level = host.rpartition(".")[2]
    return "." in host and top_level[0].isalpha() and not f".{host}".endswith(_PRIVATE_SUFFIXES)
