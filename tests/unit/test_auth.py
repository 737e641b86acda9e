"""Tokens: which are accepted, and that all others are refused for the right reason."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.hazmat.primitives.serialization import PublicFormat as Format
from hypothesis import given, settings
from hypothesis import strategies as st
from jose import jwt

from restoration.errors import InvalidSettings, Unauthenticated
from serve_app.auth.local_issuer import LOCAL_AUDIENCE, ensure_key, jwks, mint_token
from serve_app.auth.tokens import LEEWAY_S, Authenticator, Issuer, Principal, issuer_from
from tests.fakes.site import API, ISSUER, open_site, settings_for_tests

# A suite runs for minutes: a token not yet valid at collection must not become valid.
DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def key_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("issuer")
    ensure_key(folder)
    return folder


@pytest.fixture(scope="module")
def key(key_dir: Path) -> rsa.RSAPrivateKey:
    return ensure_key(key_dir)


@pytest.fixture(scope="module")
def kid(key_dir: Path) -> str:
    return str(jwks(key_dir)["keys"][0]["kid"])


@pytest.fixture
async def authenticator(key_dir: Path) -> AsyncIterator[Authenticator]:
    def serve_keys(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=jwks(key_dir))

    async with httpx.AsyncClient(transport=httpx.MockTransport(serve_keys)) as http:
        yield Authenticator(Issuer(ISSUER, LOCAL_AUDIENCE, f"{ISSUER}/jwks"), http)


def _claims(**changes: Any) -> dict[str, Any]:
    """Return good claims with these changes; None leaves a claim out."""
    now = int(time.time())
    good = {"iss": ISSUER, "aud": LOCAL_AUDIENCE, "sub": "ann", "iat": now, "exp": now + 60}
    return {name: value for name, value in (good | changes).items() if value is not None}


def _private(key: rsa.RSAPrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _signed(key: rsa.RSAPrivateKey, kid: object, claims: dict[str, Any], **header: Any) -> str:
    headers = header if kid is None else {"kid": kid, **header}
    return jwt.encode(claims, _private(key), algorithm="RS256", headers=headers)


def _part(value: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


@st.composite
def _parts(draw: st.DrawFn) -> str:
    """Return three parts, the first of which is JSON of any kind."""
    header = draw(st.recursive(_LEAVES, lambda inner: st.dictionaries(_NAMES, inner), max_leaves=5))
    return f"{_part(header).decode()}.{draw(st.text('ab-_=', max_size=9))}.e30"


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("RS256")
_NAMES = st.sampled_from(["alg", "kid", "typ", "crit", "jku"])


def _no_keys(_request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"keys": []})


async def test_a_minted_token_says_who_calls(authenticator: Authenticator, key_dir: Path) -> None:
    """The local issuer's tokens prove their subject and scopes."""
    token = mint_token(key_dir, ISSUER, LOCAL_AUDIENCE, "ann", scopes=["read", "write"])
    assert await authenticator.authenticate(token) == Principal("ann", frozenset({"read", "write"}))


async def test_one_audience_of_several_is_enough(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """Auth0 puts its own audience next to ours."""
    token = _signed(key, kid, _claims(aud=["https://auth0.test/userinfo", LOCAL_AUDIENCE]))
    assert (await authenticator.authenticate(token)).sub == "ann"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": int(time.time()) - LEEWAY_S - 60},
        {"nbf": int(time.time()) + DAY_S},
        {"iat": int(time.time()) + DAY_S},
        {"iss": "http://evil.test"},
        {"iss": f"{ISSUER}/"},
        {"aud": "something-else"},
        {"aud": []},
        {"sub": ""},
        {"sub": " "},
        {"sub": "ann\0"},
        {"sub": 7},
        {"sub": "x" * 256},
        {"sub": "ann\ud800"},
        {"exp": "soon"},
        {"exp": "99999999999"},  # a number as text is not a NumericDate (RFC 7519)
        {"exp": True},
        {"exp": {}},
        {"exp": float("nan")},
        {"iat": "1"},
        {"iat": False},
        {"iat": float("nan")},
        {"nbf": "1"},
        {"nbf": False},
        {"exp": [1]},
        {"exp": 1e400},  # JSON has no infinity, but Python's reads one
        {"iat": 1e400},
        {"nbf": 1e400},
        {"iat": "now"},
        {"iss": None},
        {"aud": None},
        {"sub": None},
        {"exp": None},
        {"iat": None},
    ],
    ids=lambda changes: next(iter(changes)),  # a time in an id would differ between processes
)
async def test_claims_that_are_not_accepted(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str, changes: dict[str, Any]
) -> None:
    """A good signature is not enough: each of subject, issuer, audience and times must be valid."""
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(_signed(key, kid, _claims(**changes)))


async def test_times_may_have_fractions(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """A NumericDate is any JSON number, and an expiry may be far in the future."""
    now = time.time()
    for claims in (_claims(exp=now + 60.5, iat=now - 0.5, nbf=now - 1.5), _claims(exp=10**30)):
        assert (await authenticator.authenticate(_signed(key, kid, claims))).sub == "ann"


async def test_clocks_may_differ_a_little(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """A token is good within the leeway on either side."""
    now = int(time.time())
    for claims in (_claims(exp=now - 5), _claims(nbf=now + 5, iat=now + 5)):
        assert (await authenticator.authenticate(_signed(key, kid, claims))).sub == "ann"


async def test_a_token_without_a_signature(authenticator: Authenticator, kid: str) -> None:
    """`alg: none` is refused in any spelling and with any key id."""
    for alg in ("none", "None", "NONE", ""):
        token = b".".join([_part({"alg": alg, "kid": kid}), _part(_claims()), b""]).decode()
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(token)


async def test_the_public_key_is_no_hmac_secret(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, key_dir: Path, kid: str
) -> None:
    """An HS256 token signed with the public key, in any published form, is refused, whether its
    header says HS256 or RS256."""
    public = key.public_key()
    secrets = [
        public.public_bytes(Encoding.PEM, Format.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, Format.SubjectPublicKeyInfo),
        json.dumps(jwks(key_dir)["keys"][0]).encode(),
    ]
    for secret in secrets:
        for alg in ("HS256", "RS256"):
            signed = _part({"alg": alg, "typ": "JWT", "kid": kid}) + b"." + _part(_claims())
            mac = base64.urlsafe_b64encode(hmac.digest(secret, signed, hashlib.sha256)).rstrip(b"=")
            with pytest.raises(Unauthenticated):
                await authenticator.authenticate((signed + b"." + mac).decode())


async def test_only_rs256_will_do(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """Another algorithm is refused even with the right key: tokens do not choose ours."""
    token = jwt.encode(_claims(), _private(key), algorithm="RS512", headers={"kid": kid})
    with pytest.raises(Unauthenticated, match="RS256"):
        await authenticator.authenticate(token)


async def test_a_key_that_the_token_brings_along(authenticator: Authenticator, kid: str) -> None:
    """Keys come from the issuer, never from the token's own header."""
    mine = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for own_kid in (kid, "mine"):
        token = _signed(mine, own_kid, _claims(), jku="http://evil.test/jwks", jwk={"kty": "RSA"})
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(token)


@pytest.mark.auth
@pytest.mark.parametrize("field", ["jku", "jwk", "x5u", "x5c"])
async def test_a_token_that_offers_a_key_is_refused(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str, field: str
) -> None:
    """The fields are refused, not ignored, even if the signature is good."""
    with pytest.raises(Unauthenticated, match=field):
        await authenticator.authenticate(_signed(key, kid, _claims(), **{field: "https://evil"}))


@pytest.mark.auth
async def test_an_encrypted_token_is_refused(authenticator: Authenticator, kid: str) -> None:
    """A JWE with its five parts is refused, with any header."""
    for alg in ("RSA-OAEP", "dir", "RS256"):
        header = _part({"alg": alg, "enc": "A256GCM", "zip": "DEF", "kid": kid})
        token = b".".join([header, _part("key"), _part("iv"), _part("text"), _part("tag")])
        with pytest.raises(Unauthenticated, match="three parts"):
            await authenticator.authenticate(token.decode())


@pytest.mark.auth
async def test_a_token_of_a_megabyte_is_not_parsed(
    authenticator: Authenticator,
    key: rsa.RSAPrivateKey,
    kid: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its length alone gets a signed token refused; none of it is decoded."""
    token = _signed(key, kid, _claims(padding="x" * 2**20))

    def decoded(_token: str) -> None:
        raise AssertionError("the token was decoded")

    monkeypatch.setattr(jwt, "get_unverified_header", decoded)
    with pytest.raises(Unauthenticated, match="longer"):
        await authenticator.authenticate(token)


@pytest.mark.auth
async def test_roles_permissions_and_scope_are_both_read(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """Auth0's two claims form one set of scopes; a claim of another type refuses the token."""
    claims = _claims(scope="restorations:read", permissions=["workflows:run"])
    principal = await authenticator.authenticate(_signed(key, kid, claims))
    assert principal.scopes == {"restorations:read", "workflows:run"}
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(_signed(key, kid, _claims(permissions="admin")))


async def test_a_token_that_names_no_key(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """A token without a key id, or with one that is not text, is refused."""
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(_signed(key, None, _claims()))
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(_signed(key, [kid], _claims()))


async def test_critical_extensions_are_refused(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """RFC 7515: a verifier that does not understand a critical extension must refuse the token."""
    with pytest.raises(Unauthenticated, match="crit"):
        await authenticator.authenticate(_signed(key, kid, _claims(), crit=["b64"], b64=False))


@pytest.mark.parametrize(
    "token", ["", ".", "..", "...", "garbage", "a.b.c", "é.é.é", "e30.e30.e30", "x" * 10_000]
)
async def test_garbage_is_no_token(authenticator: Authenticator, token: str) -> None:
    """Text that does not parse is refused like any other bad token."""
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(token)


_NESTED = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    "text",
    [
        _NESTED,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"kid":' + _NESTED + b"}",
        b'{"kid":' + b"9" * 5000 + b"}",
        b'{"kid":-1e999999}',
        b'{"kid":NaN}',
        b'{"kid":"\xff"}',
        b'\xef\xbb\xbf{"kid":"bom"}',
        b'{"kid":"k","kid":{}}',
        b'{"alg":["RS256"],"kid":"k"}',
        b'{"alg":"RS256","kid":{"k":1}}',
        b'{"alg":"RS256","kid":true}',
        b'{"alg":"RS256","kid":"\\ud800"}',
        b"[]",
        b"null",
        b"7",
        b'"RS256"',
    ],
    ids=lambda text: text[:20].decode("latin-1"),
)
async def test_a_header_of_an_odd_shape_is_refused(
    authenticator: Authenticator, text: bytes
) -> None:
    """A deep, long or mistyped header makes a bad token, not an internal error."""
    header = base64.urlsafe_b64encode(text).rstrip(b"=").decode()
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(f"{header}.e30.e30")


@pytest.mark.parametrize(
    "text",
    [
        _NESTED,
        b'{"a":' + b"[" * 4000 + b"]" * 4000 + b"}",
        b'{"iat":' + b"9" * 5000 + b"}",
        b'{"sub":"\xff"}',
        b"[]",
        b"null",
        b"",
    ],
    ids=lambda text: text[:20].decode("latin-1"),
)
async def test_claims_of_an_odd_shape_are_refused(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str, text: bytes
) -> None:
    """A good signature does not make odd claims acceptable."""
    header = _part({"alg": "RS256", "kid": kid})
    signed = header + b"." + base64.urlsafe_b64encode(text).rstrip(b"=")
    signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    token = signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(token.decode())


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")) | _parts())
@settings(max_examples=300, deadline=None)
async def test_no_text_is_a_fault_of_the_service(token: str) -> None:
    """Any text in place of a token is refused as a bad token."""
    async with httpx.AsyncClient(transport=httpx.MockTransport(_no_keys)) as http:
        with pytest.raises(Unauthenticated):
            await Authenticator(Issuer(ISSUER, "api", f"{ISSUER}/jwks"), http).authenticate(token)


async def test_a_token_with_a_part_missing_or_changed(
    authenticator: Authenticator, key: rsa.RSAPrivateKey, kid: str
) -> None:
    """Missing dots, a missing part and unsigned claims are refused."""
    header, claims, signature = _signed(key, kid, _claims()).split(".")
    forged = _part(_claims(sub="admin")).decode()
    for token in (
        header + claims + signature,
        f"{header}.{claims}",
        f"{header}.{claims}.",
        f"{header}..{signature}",
        f"{header}.{forged}.{signature}",
    ):
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(token)


@pytest.mark.parametrize("header", [None, "Basic YTpi", "Bearer", "Bearer ", "Bearer a.b.c"])
async def test_over_http_a_bad_token_is_401(header: str | None) -> None:
    """The answer names the kind of credentials required and does not repeat those it received."""
    async with open_site() as site, site.client(sub=None) as client:
        answer = await client.get(API, headers={"Authorization": header} if header else {})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    challenge = 'Bearer realm="comfy-restore"'
    if header == "Bearer a.b.c":  # RFC 6750: a request without a token gets no error code
        challenge += ', error="invalid_token"'
    assert answer.headers["www-authenticate"] == challenge
    assert "a.b.c" not in answer.text


def test_the_issuer_is_auth0_where_it_is_set() -> None:
    """Auth0 needs domain and audience; its issuer's name ends with a slash."""
    settings = settings_for_tests(auth0_domain="t.eu.auth0.com", auth0_audience="api")
    assert issuer_from(settings) == Issuer(
        "https://t.eu.auth0.com/", "api", "https://t.eu.auth0.com/.well-known/jwks.json"
    )


def test_the_issuer_is_the_local_one_otherwise() -> None:
    """The local issuer's name is its address."""
    assert issuer_from(settings_for_tests(local_issuer_url="http://127.0.0.1:9/")) == Issuer(
        "http://127.0.0.1:9", LOCAL_AUDIENCE, "http://127.0.0.1:9/.well-known/jwks.json"
    )


def test_without_an_issuer_nothing_starts() -> None:
    """Without an issuer the service refuses to start and names the settings to set."""
    with pytest.raises(InvalidSettings, match="AUTH0_DOMAIN"):
        issuer_from(settings_for_tests(local_issuer_url=None))
