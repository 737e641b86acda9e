"""All known attacks on authentication, against the running service.

The attacker has a token of a real user, the issuer's published key, a key pair of its own and,
where that makes the attack stronger, tokens signed by the issuer itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jose import jwt

from serve_app.auth.local_issuer import LOCAL_AUDIENCE, ensure_key, jwks
from serve_app.auth.scopes import USER_SCOPES
from serve_app.auth.tokens import LEEWAY_S
from serve_app.local.record import issuer_folder
from tests.fakes.site import API, submission
from tests.support.stack import Stack
from tests.support.stack_processes import of_stack

HOUR_S = 3600


@dataclass(frozen=True)
class Forge:
    """Makes and presents tokens that are valid except for the changes of a test."""

    http: httpx.Client
    issuer: str
    key: rsa.RSAPrivateKey
    kid: str

    def claims(self, **changes: object) -> dict[str, Any]:
        """Return valid claims with these changes; None removes a claim."""
        now = int(time.time())
        good = {
            **{"iss": self.issuer, "aud": LOCAL_AUDIENCE, "sub": "tester"},
            **{"iat": now, "exp": now + HOUR_S, "scope": " ".join(USER_SCOPES)},
        }
        return {name: value for name, value in (good | changes).items() if value is not None}

    def sign(
        self,
        claims: dict[str, Any] | None = None,
        key: rsa.RSAPrivateKey | None = None,
        algorithm: str = "RS256",
        **header: object,
    ) -> str:
        """Sign with the issuer's own key, unless another one is given."""
        headers = {name: value for name, value in {"kid": self.kid, **header}.items() if value}
        pem = (key or self.key).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return jwt.encode(claims or self.claims(), pem.decode(), algorithm, headers)

    def present(self, token: str) -> httpx.Response:
        return self.http.get(API, headers={"Authorization": f"Bearer {token}"})

    def assert_refused(self, token: str) -> None:
        answer = self.present(token)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert answer.headers["www-authenticate"] == (
            'Bearer realm="comfy-restore", error="invalid_token"'
        )
        assert token not in answer.text


@pytest.fixture(scope="module")
def forge(stack: Stack) -> Iterator[Forge]:
    folder = issuer_folder(stack.state_dir)
    issuer = stack.record.issuer
    assert issuer is not None
    kid = jwks(folder)["keys"][0]["kid"]
    with httpx.Client(base_url=stack.record.url, timeout=300, trust_env=False) as http:
        yield Forge(http, issuer, ensure_key(folder), kid)


@pytest.fixture(scope="module")
def own_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.auth
def test_what_the_forge_makes_is_good(forge: Forge) -> None:
    """An unchanged token is accepted, so that each attack below differs from it in one thing."""
    assert forge.present(forge.sign()).status_code == 200


@pytest.mark.auth
def test_a_request_without_a_token_is_told_how_to_authenticate(forge: Forge) -> None:
    """The answer is 401 with the scheme, and without an error about a token (RFC 6750)."""
    answer = forge.http.get(API)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="comfy-restore"'


@pytest.mark.auth
def test_a_missing_scope_is_named(forge: Forge) -> None:
    """The answer is 403, and its header names the scope to request."""
    token = forge.sign(forge.claims(scope="restorations:read"))
    headers = {"Authorization": f"Bearer {token}"}
    answer = forge.http.post(API, headers=headers, **submission())
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
    assert answer.headers["www-authenticate"] == (
        'Bearer realm="comfy-restore", error="insufficient_scope", scope="restorations:write"'
    )


@pytest.mark.auth
@pytest.mark.parametrize("alg", ["none", "None", "nOnE", ""])
def test_alg_none(forge: Forge, alg: str) -> None:
    """A token that claims to need no signature is refused."""
    header, claims = _part({"alg": alg, "typ": "JWT", "kid": forge.kid}), _part(forge.claims())
    forge.assert_refused(f"{header}.{claims}.")


@pytest.mark.auth
@pytest.mark.parametrize("form", ["pem", "der", "jwk"])
@pytest.mark.parametrize("alg", ["HS256", "RS256"])
def test_hmac_with_the_public_key(forge: Forge, alg: str, form: str) -> None:
    """The public key is not accepted as an HMAC secret in any form, under any header."""
    public = forge.key.public_key()
    secret = {
        "pem": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "jwk": forge.http.get(f"{forge.issuer}/.well-known/jwks.json").content,
    }[form]
    signed = f"{_part({'alg': alg, 'kid': forge.kid})}.{_part(forge.claims())}"
    mac = hmac.digest(secret, signed.encode(), hashlib.sha256)
    forge.assert_refused(f"{signed}.{_base64(mac)}")


@pytest.mark.auth
@pytest.mark.parametrize("algorithm", ["RS384", "RS512"])
def test_another_algorithm_with_the_right_key(forge: Forge, algorithm: str) -> None:
    """RS256 is pinned, so that the issuer's own signature by another algorithm is refused."""
    forge.assert_refused(forge.sign(algorithm=algorithm))


@pytest.mark.auth
def test_a_key_of_ones_own(forge: Forge, own_key: rsa.RSAPrivateKey) -> None:
    """A signature by another key under the issuer's key id is refused."""
    forge.assert_refused(forge.sign(key=own_key))


@pytest.mark.auth
def test_an_unknown_kid(forge: Forge, own_key: rsa.RSAPrivateKey) -> None:
    """An unknown key id is refused, signed by its own key or by the issuer's."""
    forge.assert_refused(forge.sign(key=own_key, kid="mine"))
    forge.assert_refused(forge.sign(kid="../../issuer-key.pem"))


@pytest.mark.auth
def test_a_missing_kid(forge: Forge) -> None:
    """Keys are not tried one after another."""
    forge.assert_refused(forge.sign(kid=None))


@pytest.mark.auth
@pytest.mark.parametrize("field", ["jku", "x5u", "jwk", "x5c"])
def test_a_header_that_brings_a_key(forge: Forge, own_key: rsa.RSAPrivateKey, field: str) -> None:
    """The token is refused with the attacker's signature, and even with the issuer's own."""
    numbers = own_key.public_key().public_numbers()
    jwk = {
        **{"kty": "RSA", "alg": "RS256", "kid": forge.kid},
        "n": _base64(numbers.n.to_bytes(256, "big")),
        "e": _base64(numbers.e.to_bytes(3, "big")),
    }
    value: Any = jwk if field == "jwk" else f"{forge.issuer}/.well-known/jwks.json"
    forge.assert_refused(forge.sign(key=own_key, **{field: value}))
    forge.assert_refused(forge.sign(**{field: value}))


@pytest.mark.auth
@pytest.mark.parametrize("audience", ["another-service", ["a", "b"], [], None])
def test_another_audience(forge: Forge, audience: object) -> None:
    """A token for another service of the same issuer is refused."""
    forge.assert_refused(forge.sign(forge.claims(aud=audience)))


@pytest.mark.auth
@pytest.mark.parametrize("issuer", ["https://evil.example.com/", "", None])
def test_another_issuer(forge: Forge, issuer: str | None) -> None:
    """A token of another issuer, or without one, is refused."""
    forge.assert_refused(forge.sign(forge.claims(iss=issuer)))


@pytest.mark.auth
def test_an_expired_token(forge: Forge) -> None:
    """A token is refused after its end and a small leeway for clocks, and without an end."""
    forge.assert_refused(forge.sign(forge.claims(exp=int(time.time()) - LEEWAY_S - 10)))
    forge.assert_refused(forge.sign(forge.claims(exp=None)))


@pytest.mark.auth
@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_a_token_that_is_not_valid_yet(forge: Forge, claim: str) -> None:
    """A token for later, or issued in the future, is refused."""
    forge.assert_refused(forge.sign(forge.claims(**{claim: int(time.time()) + HOUR_S})))


@pytest.mark.auth
def test_an_encrypted_token(forge: Forge) -> None:
    """A token with five parts, like a JWE, is neither decrypted nor unpacked."""
    header = {"alg": "RSA-OAEP", "enc": "A256GCM", "zip": "DEF", "kid": forge.kid}
    forge.assert_refused(".".join([_part(header), *(_base64(os.urandom(64)) for _ in range(4))]))


@pytest.mark.auth
def test_missing_dots(forge: Forge) -> None:
    """A token without one or both of its dots, or with an empty part, is refused."""
    header, claims, signature = forge.sign().split(".")
    for token in (
        f"{header}{claims}.{signature}",
        f"{header}.{claims}{signature}",
        header + claims + signature,
        f"{header}.{claims}",
        f"{header}..{signature}",
        f".{claims}.{signature}",
        f"{header}.{claims}.",
    ):
        forge.assert_refused(token)


@pytest.mark.auth
def test_claims_that_were_not_signed(forge: Forge) -> None:
    """The signature of one token does not cover the claims of another."""
    header, _, signature = forge.sign().split(".")
    forge.assert_refused(f"{header}.{_part(forge.claims(sub='root', scope='admin'))}.{signature}")


@pytest.mark.auth
def test_a_megabyte_of_token(forge: Forge) -> None:
    """A token that is too long is refused, signed or not, by the first server that notices."""
    signed = forge.sign(forge.claims(padding="x" * 2**20))
    for token in (signed, "x" * 2**20, "." * 2**20):
        try:
            status = forge.present(token).status_code
        except httpx.TransportError:
            continue  # the server in front closed the connection
        assert status in (400, 401, 431)
    assert forge.present(forge.sign()).status_code == 200


@pytest.mark.auth
def test_a_token_that_just_fits_a_header_is_too_long(forge: Forge) -> None:
    """Below the limit of the server in front, our own limit applies; HAProxy's is lower."""
    token = forge.sign(forge.claims(padding="x" * 20_000))
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        assert forge.present(token).status_code == 400
    else:
        forge.assert_refused(token)


@pytest.mark.auth
@pytest.mark.parametrize("name", ["access_token", "token", "bearer", "authorization"])
def test_a_token_in_the_query_string_is_not_read(forge: Forge, name: str) -> None:
    """URLs end up in logs and histories, so that a token there is ignored."""
    answer = forge.http.get(API, params={name: forge.sign()})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="comfy-restore"'


@pytest.mark.auth
def test_a_token_elsewhere_is_not_read(forge: Forge) -> None:
    """A token in a cookie, in the form or under another scheme is ignored."""
    token = forge.sign()
    for headers in (
        {"Cookie": f"access_token={token}; Authorization=Bearer {token}"},
        {"X-Access-Token": token},
        {"Authorization": token},
        {"Authorization": f"Basic {token}"},
        {"Proxy-Authorization": f"Bearer {token}"},
    ):
        assert forge.http.get(API, headers=headers).status_code == 401
    assert forge.http.post(API, **submission(access_token=token)).status_code == 401


@pytest.mark.auth
def test_known_keys_serve_while_the_issuer_hangs(stack: Stack, forge: Forge) -> None:
    """While the issuer hangs, known keys still work, and unknown ones are refused."""
    assert forge.present(forge.sign()).status_code == 200
    [issuer] = [
        each for each in of_stack(stack.state_dir) if each.runs("serve_app.auth.local_issuer")
    ]
    os.kill(issuer.pid, signal.SIGSTOP)
    try:
        for number in range(3):
            assert forge.present(forge.sign()).status_code == 200
            assert forge.present(forge.sign(kid=f"invented-{number}")).status_code in (401, 503)
    finally:
        os.kill(issuer.pid, signal.SIGCONT)
