"""The issuer's keys: fetched when needed, kept through outages, with a limited rate of fetches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from jose import jwt

from restoration.errors import DependencyUnavailable, Unauthenticated
from serve_app.auth.jwks import MAX_AGE_S, MIN_INTERVAL_S, RETRY_S, KeySet
from serve_app.auth.local_issuer import KEY_FILE, ensure_key, jwks, mint_token


@dataclass
class FakeIssuer:
    """An issuer that answers with `document` and counts; `down` refuses the connection."""

    document: Any
    status: int = 200
    down: bool = False
    asked: int = 0
    now_s: float = 0.0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        await self.gate.wait()
        if self.down:
            raise httpx.ConnectError("refused", request=request)
        if isinstance(self.document, bytes):
            return httpx.Response(self.status, content=self.document)
        return httpx.Response(self.status, json=self.document)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the key sets of two issuers, or of one before and after it changed its key."""
    return [jwks(tmp_path_factory.mktemp("issuer")) for _ in range(2)]


def _kid(document: dict[str, Any]) -> str:
    return str(document["keys"][0]["kid"])


@pytest.fixture
def issuer(documents: list[dict[str, Any]]) -> FakeIssuer:
    issuer = FakeIssuer(documents[0])
    issuer.gate.set()
    return issuer


@pytest.fixture
async def keys(issuer: FakeIssuer) -> AsyncIterator[KeySet]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(issuer.answer)) as http:
        yield KeySet("http://issuer.test/jwks", http, clock=lambda: issuer.now_s)


async def test_keys_are_fetched_once(issuer: FakeIssuer, keys: KeySet) -> None:
    """One fetch serves every later token and all tokens that arrive during it."""
    issuer.gate.clear()
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(keys.find(_kid(issuer.document)))
        await asyncio.sleep(0)
        issuer.gate.set()
    await keys.find(_kid(issuer.document))
    assert issuer.asked == 1


async def test_a_new_key_is_found(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]]
) -> None:
    """The first token that names the issuer's new key triggers a fetch."""
    await keys.find(_kid(documents[0]))
    issuer.document = documents[1]
    issuer.now_s += MIN_INTERVAL_S
    await keys.find(_kid(documents[1]))
    with pytest.raises(Unauthenticated):
        await keys.find(_kid(documents[0]))


@pytest.mark.auth
async def test_rotation_refuses_nobody(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]]
) -> None:
    """Tokens stay accepted while the issuer publishes the next key beside the old one, signs with
    it, and withdraws the old one."""
    old, new = _kid(documents[0]), _kid(documents[1])
    both = {"keys": documents[0]["keys"] + documents[1]["keys"]}
    await keys.find(old)
    issuer.document = both
    issuer.now_s += MIN_INTERVAL_S
    await keys.find(new)  # before the old set expired: its id was unknown
    await keys.find(old)
    issuer.document = documents[1]
    issuer.now_s += MAX_AGE_S
    await keys.find(new)
    assert issuer.asked == 3


async def test_invented_key_ids_do_not_reach_the_issuer(issuer: FakeIssuer, keys: KeySet) -> None:
    """However many unknown key ids arrive, the issuer is asked once per interval."""
    await keys.find(_kid(issuer.document))
    for number in range(50):
        with pytest.raises(Unauthenticated):
            await keys.find(f"invented-{number}")
    assert issuer.asked == 1
    issuer.now_s += MIN_INTERVAL_S
    for number in range(50):
        with pytest.raises(Unauthenticated):
            await keys.find(f"invented-{number}")
    assert issuer.asked == 2


async def test_keys_outlive_their_issuer(issuer: FakeIssuer, keys: KeySet) -> None:
    """While the issuer is down, known keys stay in use, however old."""
    await keys.find(_kid(issuer.document))
    issuer.down = True
    issuer.now_s += 100 * MAX_AGE_S
    await keys.find(_kid(issuer.document))
    assert issuer.asked == 2
    await keys.ping()


async def test_an_old_key_serves_while_a_fetch_hangs(issuer: FakeIssuer, keys: KeySet) -> None:
    """Only one request waits for a slow issuer; the others use the known keys."""
    kid = _kid(issuer.document)
    await keys.find(kid)
    issuer.now_s += MAX_AGE_S
    issuer.gate.clear()
    waiting = asyncio.create_task(keys.find(kid))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await keys.find(kid)
    issuer.gate.set()
    await waiting


async def test_a_withdrawn_key_ends(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]]
) -> None:
    """A key that the issuer withdrew is refused after the next fetch."""
    await keys.find(_kid(documents[0]))
    issuer.document = documents[1]
    issuer.now_s += MAX_AGE_S
    with pytest.raises(Unauthenticated):
        await keys.find(_kid(documents[0]))


@pytest.mark.parametrize("fault", ["down", "status", "no json", "no keys", "bad key"])
async def test_keys_that_never_came_are_an_outage(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]], fault: str
) -> None:
    """Without keys the service reports an outage, not a bad token, and soon fetches again."""
    kid, good = _kid(documents[0]), documents[0]
    match fault:
        case "down":
            issuer.down = True
        case "status":
            issuer.status = 500
        case "no json":
            issuer.document = "?"
        case "no keys":
            issuer.document = {}
        case "bad key":
            issuer.document = {"keys": [{**good["keys"][0], "n": "%%%"}]}
    for _ in range(5):
        with pytest.raises(DependencyUnavailable):
            await keys.find(kid)
        with pytest.raises(DependencyUnavailable):
            await keys.ping()
    assert issuer.asked == 1
    issuer.document, issuer.status, issuer.down = good, 200, False
    issuer.now_s += RETRY_S
    await keys.ping()
    await keys.find(kid)


@pytest.mark.parametrize(
    "change", [{"use": "enc"}, {"alg": "RS512"}, {"kty": "oct", "k": "c2VjcmV0"}, {"kid": 7}]
)
async def test_only_keys_for_signing_rs256_count(
    issuer: FakeIssuer, keys: KeySet, change: dict[str, Any]
) -> None:
    """Keys published for other purposes verify no token."""
    kid = _kid(issuer.document)
    issuer.document = {"keys": [{**issuer.document["keys"][0], **change}]}
    with pytest.raises(Unauthenticated):
        await keys.find(kid)


@pytest.mark.parametrize(
    "change",
    [
        {"n": None},
        {"n": 2**33},  # as a length it would be 8 GiB
        {"n": ["x"]},
        {"n": "é"},
        {"n": "%%%"},
        {"n": ""},
        {"n": "A" * 40000},
        {"n": "w" * 100},  # 600 bits
        {"e": None},
        {"e": 65537},
        {"e": "AA"},
        {"e": ""},
        {"kty": ["RSA"]},
        {"kty": None},
        {"kid": {}},
        {"alg": ["RS256"]},
        {"use": {}},
    ],
    ids=lambda change: str(change)[:30],
)
async def test_an_odd_key_spoils_no_other(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]], change: dict[str, Any]
) -> None:
    """Invalid keys of a set are left out, and the others serve."""
    odd = {**documents[1]["keys"][0], **change}
    issuer.document = {"keys": [odd, *documents[0]["keys"], odd]}
    await keys.find(_kid(documents[0]))
    with pytest.raises(Unauthenticated):
        await keys.find(_kid(documents[1]))


async def test_of_a_private_key_the_public_part_is_used(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]]
) -> None:
    """A private key that the issuer published by mistake serves through its public part."""
    issuer.document = {"keys": [{**documents[0]["keys"][0], "d": "%%%", "p": 2**40}]}
    await keys.find(_kid(documents[0]))


@pytest.mark.parametrize("odd", [None, 7, "key", [], [[]]], ids=str)
async def test_what_is_no_key_spoils_no_other(
    issuer: FakeIssuer, keys: KeySet, documents: list[dict[str, Any]], odd: object
) -> None:
    """Members of other types are left out as well."""
    issuer.document = {"keys": [odd, *documents[0]["keys"]]}
    await keys.find(_kid(documents[0]))


@pytest.mark.parametrize(
    "document", [[], None, 7, {"keys": {}}, {"keys": None}, b"[" * 5000 + b"]" * 5000], ids=type
)
async def test_a_document_of_another_shape_is_an_outage(
    issuer: FakeIssuer, keys: KeySet, document: object
) -> None:
    """The issuer is asked again later, and no token is refused as bad."""
    issuer.document = document
    with pytest.raises(DependencyUnavailable):
        await keys.find("any")


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    """The folder and the key file are private, and the key stays the same."""
    key_dir = tmp_path / "state" / "issuer"
    ensure_key(key_dir)
    first = (key_dir / KEY_FILE).read_bytes()
    ensure_key(key_dir)
    assert (key_dir / KEY_FILE).read_bytes() == first
    assert (key_dir / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert key_dir.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in key_dir.iterdir()] == [KEY_FILE]


def test_a_token_names_its_key_and_expires(tmp_path: Path) -> None:
    """A minted token carries the published key's id and the requested lifetime."""
    token = mint_token(tmp_path, "iss", "aud", "ann", lifetime_s=60)
    claims = jwt.get_unverified_claims(token)
    assert jwt.get_unverified_header(token)["kid"] == _kid(jwks(tmp_path))
    assert claims["exp"] - claims["iat"] == 60


def test_the_public_document_holds_no_secret(tmp_path: Path) -> None:
    """Only the public numbers of the key are published."""
    assert set(jwks(tmp_path)["keys"][0]) == {"kty", "n", "e", "kid", "use", "alg"}
