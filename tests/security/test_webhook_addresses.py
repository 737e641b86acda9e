"""Webhooks reach only the public internet, and no internal address."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import httpx
import pytest

from actors.webhooks.pinned_transport import resolve
from actors.webhooks.sender import SendLimits, http_client
from restoration.errors import InvalidWebhook
from restoration.webhooks.public_addresses import is_public
from restoration.webhooks.urls import WebhookRules, check_url
from tests.fakes.authority import Authority, relaying
from tests.fakes.receiver import Receiver, receiving, status

LOOPBACK = ip_network("127.0.0.0/8")
STRICT = WebhookRules(enabled=True)
# Strict, except for the one address at which a test can have a receiver.
ONE_ADDRESS = WebhookRules(enabled=True, networks=(ip_network("127.0.0.1/32"),))
NAME = "hooks.example.com"
REFUSED = "does not resolve to public addresses only"


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.1", "172.32.0.1"),
        *("192.0.1.1", "192.31.196.1", "198.20.0.1", "223.255.255.255", "11.0.0.1"),
        *("2606:4700:4700::1111", "2a00:1450::1", "2001:4860:4860::8888", "2400:cb00::1"),
    ],
)
def test_public_addresses_are_public(address: str) -> None:
    """Addresses next to private ranges are public too."""
    assert is_public(ip_address(address))


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 - nothing is bound to it
        *("0.1.2.3", "10.0.0.1", "127.0.0.1", "127.255.255.254", "172.16.0.1"),
        *("172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255", "100.100.100.200"),
        *("169.254.169.254", "169.254.170.2", "168.63.129.16", "192.0.0.1", "192.0.0.192"),
        *("192.0.2.1", "192.88.99.1", "198.18.0.1", "198.19.255.255", "198.51.100.1"),
        *("203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1"),
        *("ff02::1", "ff0e::1", "100::1", "2001:db8::1", "2001:10::1", "3fff::1", "5f00::1"),
        # embedded IPv4 addresses: mapped, compatible, NAT64, 6to4, Teredo
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:0:7f00:1::"),
        "2606:4700:4700::1111%eth0",
    ],
)
def test_no_other_address_is(address: str) -> None:
    """Addresses that IANA reserves, metadata services and IPv4 inside IPv6 are not public."""
    assert not is_public(ip_address(address))


@dataclass
class Names:
    """A resolver that returns a test's answers in order, and then repeats the last one."""

    answers: list[Sequence[str]]
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def post(
    url: str, rules: WebhookRules, names: Names, tls: ssl.SSLContext | None = None
) -> httpx.Response:
    async with http_client(SendLimits(), rules, names.resolve, tls) as http:
        return await http.post(url, content=b"{}")


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.2"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["fd00:ec2::254"],
        ["::ffff:127.0.0.1"],
        ["127.0.0.1", "10.0.0.1"],  # one permitted address is not enough
        ["10.0.0.1", "127.0.0.1"],
        [],
    ],
    ids=str,
)
async def test_a_name_that_leads_inside_is_not_connected_to(addresses: list[str]) -> None:
    """If one of a name's addresses is not permitted, nothing is sent to any."""
    async with receiving() as receiver:
        url = f"https://{NAME}:{receiver.port}/"
        with pytest.raises(httpx.ConnectError, match=REFUSED):
            await post(url, ONE_ADDRESS, Names([addresses]))
    assert receiver.seen == []


@pytest.mark.webhooks
async def test_a_name_that_does_not_exist_looks_like_one_that_leads_inside() -> None:
    """The error of a failed webhook does not reveal whether an internal name exists."""

    class Unknown(Names):
        async def resolve(self, host: str, port: int) -> Sequence[str]:
            raise OSError("no such name")

    with pytest.raises(httpx.ConnectError, match=REFUSED):
        await post(f"https://{NAME}/", STRICT, Unknown([]))


@pytest.mark.webhooks
async def test_the_real_resolver_is_held_to_the_rules() -> None:
    """A name that this machine's own resolver maps to loopback is refused."""
    assert {ip_address(each).is_loopback for each in await resolve("localhost", 443)} == {True}
    elsewhere = WebhookRules(enabled=True, networks=(ip_network("10.0.0.0/8"),))
    async with http_client(SendLimits(), elsewhere) as http:
        with pytest.raises(httpx.ConnectError, match=REFUSED):
            await http.post("https://localhost/")


@pytest.mark.webhooks
async def test_the_rules_hold_when_it_is_sent_as_well() -> None:
    """A URL accepted under looser rules is not used under stricter ones."""
    async with receiving() as receiver:
        with pytest.raises(httpx.ConnectError, match="must start with https"):
            await post(receiver.url(), ONE_ADDRESS, Names([["127.0.0.1"]]))
    assert receiver.seen == []


@pytest.mark.webhooks
async def test_no_proxy_from_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would resolve the name itself, and see the signed request."""
    local = WebhookRules(enabled=True, allow_http=True, networks=(LOOPBACK,))
    async with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        url = f"http://{NAME}:{receiver.port}/hook"
        assert (await post(url, local, Names([["127.0.0.1"]]))).status_code == 204
    assert (len(proxy.seen), len(receiver.seen)) == (0, 1)


# --- over TLS, with an authority of the test's own


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def receiving_tls(
    authority: Authority, name: str, seen: list[str | None]
) -> AsyncIterator[Receiver]:
    """Run a receiver behind TLS that relays to a plain one."""

    async with receiving() as plain:
        async with relaying(plain.port, authority.server(name, seen)) as port:
            yield Receiver(port=port, seen=plain.seen)


@pytest.mark.webhooks
async def test_what_was_looked_at_is_what_is_connected_to(authority: Authority) -> None:
    """A connection resolves its name only once, so that a changed answer (DNS rebinding) has no
    effect. Handshake, certificate and Host header still use the name."""
    handshakes: list[str | None] = []
    names = Names([["127.0.0.1"], ["127.0.0.2"]])
    async with receiving_tls(authority, NAME, handshakes) as receiver:
        url = f"https://{NAME}:{receiver.port}/hook?a=b"
        answer = await post(url, ONE_ADDRESS, names, authority.client())
        with pytest.raises(httpx.ConnectError, match=REFUSED):
            await post(url, ONE_ADDRESS, names, authority.client())
    assert answer.status_code == 204
    assert names.asked == [NAME, NAME]
    assert handshakes == [NAME]
    [seen] = receiver.seen
    assert (seen.target, seen.headers["host"]) == ("/hook?a=b", f"{NAME}:{receiver.port}")


@pytest.mark.webhooks
async def test_the_certificate_must_be_the_names(authority: Authority) -> None:
    """Nothing is sent to a server with another name's certificate, or one of an unknown
    authority."""
    names = Names([["127.0.0.1"]])
    async with receiving_tls(authority, "other.example.com", []) as receiver:
        url = f"https://{NAME}:{receiver.port}/"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await post(url, ONE_ADDRESS, names, authority.client())
    async with receiving_tls(authority, NAME, []) as stranger:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await post(f"https://{NAME}:{stranger.port}/", ONE_ADDRESS, names)
    assert receiver.seen == stranger.seen == []


@pytest.mark.webhooks
async def test_two_names_with_one_address_share_no_connection(authority: Authority) -> None:
    """A connection verified for one name is not reused for another name."""
    handshakes: list[str | None] = []
    names = Names([["127.0.0.1"]])
    async with (
        receiving_tls(authority, NAME, handshakes) as receiver,
        http_client(SendLimits(), ONE_ADDRESS, names.resolve, authority.client()) as http,
    ):
        await http.post(f"https://{NAME}:{receiver.port}/", content=b"{}")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http.post(f"https://other.example.com:{receiver.port}/", content=b"{}")
    assert handshakes == [NAME, "other.example.com"]
    assert len(receiver.seen) == 1


@pytest.mark.webhooks
async def test_a_dead_address_among_others_does_no_harm() -> None:
    """If a name's first address refuses the connection, the second is tried."""
    local = WebhookRules(enabled=True, allow_http=True, networks=(LOOPBACK,))
    async with receiving() as receiver:
        url = f"http://{NAME}:{receiver.port}/"
        names = Names([["127.9.9.9", "127.0.0.1"]])
        assert (await post(url, local, names)).status_code == 204
    assert names.asked == [NAME]


@pytest.mark.webhooks
async def test_a_redirect_leads_nowhere() -> None:
    """A redirect is not followed, even to a permitted address."""
    local = WebhookRules(enabled=True, allow_http=True, networks=(LOOPBACK,))
    async with receiving() as receiver, receiving() as elsewhere:
        receiver.default = status(307, Location=elsewhere.url())
        answer = await post(receiver.url(NAME), local, Names([["127.0.0.1"]]))
    assert answer.status_code == 307
    assert elsewhere.seen == []


@pytest.mark.webhooks
def test_no_spelling_of_an_address_gets_around() -> None:
    """Decimal, octal, hex and short forms, users, unicode digits, trailing dots and zones are
    refused."""
    for host in (
        *("2130706433", "0177.0.0.1", "0x7f000001", "0x7f.1", "127.1", "127.0.0.1.", "0"),
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[::1%25lo]"),
        *("user@127.0.0.1", "example.com@127.0.0.1", "example.com:443@127.0.0.1"),
        *("①②⑦.⓪.⓪.①", "127。0。0。1", "localhost", "LOCALHOST", "metadata.google.internal"),
        *("example.com%00.evil.com", "example.com\\@127.0.0.1", "169.254.169.254"),
    ):
        with pytest.raises(InvalidWebhook):
            check_url(f"https://{host}/", STRICT)
