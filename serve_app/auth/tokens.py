"""Verify RS256 JWTs against their issuer's keys and return the caller as a Principal.

Auth0 and the local stack's issuer take the same path; only the addresses differ. Every rejected
token raises Unauthenticated, with a message that never repeats the token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from jose import jwt
from jose.exceptions import ExpiredSignatureError, JOSEError
from pydantic import ValidationError

from restoration.errors import InvalidSettings, Unauthenticated
from restoration.limits.quotas import Quotas
from restoration.settings import Settings
from serve_app.auth.jwks import ALGORITHM, KeySet
from serve_app.auth.local_issuer import LOCAL_AUDIENCE
from serve_app.auth.scopes import Scope, granted

LEEWAY_S = 30  # allows for clocks that differ
# Auth0 keeps a claim added by an Action only if its name is a URL. The URL need not exist.
QUOTAS_CLAIM = "https://comfy-restore/quotas"
KEYS_PATH = "/.well-known/jwks.json"
# Checked before anything is decoded; load balancers accept headers up to about this size.
MAX_TOKEN_CHARS = 16 * 1024
# Header fields (RFC 7515) by which a token brings its own key (`jku`, `jwk`, `x5u`, `x5c`) or
# demands extensions that are not supported here (`crit`). No legitimate client sends them, so they
# are refused rather than ignored.
_REFUSED_FIELDS = frozenset({"jku", "jwk", "x5u", "x5c", "crit"})
# jose raises these for claims of unexpected types and sizes, and Python's JSON decoder for claims
# nested too deep.
_ODD_CLAIMS = (ArithmeticError, RecursionError, TypeError, ValueError)
_TIMES = ("exp", "iat", "nbf")
MAX_SUBJECT_CHARS = 255  # as in OpenID Connect; it is a key of the database


@dataclass(frozen=True, slots=True)
class Issuer:
    """An accepted issuer (`iss`), the audience its tokens must name (`aud`), and its keys' URL."""

    name: str
    audience: str
    jwks_url: str


@dataclass(frozen=True, slots=True)
class Principal:
    """The authenticated caller. `sub` owns the jobs that it submits."""

    sub: str
    scopes: frozenset[str]
    quotas: Quotas = field(default_factory=Quotas)

    @property
    def reach(self) -> str | None:
        """The owner whose jobs the caller may access; None for all owners' (`admin`)."""
        return None if Scope.ADMIN in self.scopes else self.sub


def issuer_from(settings: Settings) -> Issuer:
    """Return Auth0 if it is configured, otherwise the local issuer.

    Raises InvalidSettings if neither is configured.
    """
    if settings.auth0_domain and settings.auth0_audience:
        url = f"https://{settings.auth0_domain}"
        return Issuer(f"{url}/", settings.auth0_audience, url + KEYS_PATH)
    if settings.local_issuer_url:
        url = settings.local_issuer_url.rstrip("/")
        return Issuer(url, LOCAL_AUDIENCE, url + KEYS_PATH)
    raise InvalidSettings(
        "no token issuer is configured: set AUTH0_DOMAIN and AUTH0_AUDIENCE, or LOCAL_ISSUER_URL"
    )


class Authenticator:
    """Verifies bearer tokens and returns their principals.

    A principal has the given `quotas`, except for those that a claim of its token replaces. The
    caller closes `http`.
    """

    def __init__(
        self, issuer: Issuer, http: httpx.AsyncClient, quotas: Quotas | None = None
    ) -> None:
        self._issuer = issuer
        self._quotas = quotas or Quotas()
        self._keys = KeySet(issuer.jwks_url, http)

    async def authenticate(self, token: str) -> Principal:
        """Return the principal of `token`.

        Raises Unauthenticated if the token is not accepted, and DependencyUnavailable if the key
        could not be fetched.
        """
        key = await self._keys.find(_key_id(token))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=self._issuer.audience,
                issuer=self._issuer.name,
                # jose accepts a token that lacks a claim, unless the claim is required explicitly
                options={
                    "leeway": LEEWAY_S,
                    "require_aud": True,
                    "require_iss": True,
                    "require_exp": True,
                    "require_iat": True,
                    "require_sub": True,
                },
            )
            return _principal(claims, self._quotas)
        except ExpiredSignatureError:
            raise Unauthenticated("the token has expired") from None
        except (JOSEError, *_ODD_CLAIMS) as error:
            raise Unauthenticated(f"the token is invalid: {error}") from error

    async def ping(self) -> None:
        """Raise DependencyUnavailable if no token could be verified."""
        await self._keys.ping()


def _key_id(token: str) -> str:
    """Return the key id of a token; nothing else is read before its signature is verified.

    Raises Unauthenticated if the token is not a JWT signed with RS256.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise Unauthenticated(f"the token is longer than {MAX_TOKEN_CHARS} characters")
    if token.count(".") != 2:  # an encrypted token (RFC 7516) has five parts
        raise Unauthenticated(
            "the token is not a signed JWT, which has three parts separated by dots"
        )
    try:
        header = jwt.get_unverified_header(token)
    except (JOSEError, RecursionError):
        raise Unauthenticated("the token is not a JWT") from None
    if refused := sorted(_REFUSED_FIELDS & header.keys()):
        raise Unauthenticated(f"the token's header must not contain {', '.join(refused)}")
    kid = header.get("kid")
    if header.get("alg") != ALGORITHM or not isinstance(kid, str):
        raise Unauthenticated(
            f"the token must be signed with {ALGORITHM} and have a key id (kid) in its header"
        )
    return kid


def _principal(claims: Mapping[str, Any], quotas: Quotas) -> Principal:
    if QUOTAS_CLAIM in claims:
        # A token with invalid quotas is refused: falling back to the defaults could silently give
        # an owner more than was intended.
        try:
            quotas = quotas.replaced(claims[QUOTAS_CLAIM])
        except ValidationError as error:
            wrong = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
            raise ValueError(f"{QUOTAS_CLAIM} has invalid values: {wrong}") from None
    for name in _TIMES:
        # jose also accepts text and booleans, which RFC 7519 does not
        if name in claims and type(claims[name]) not in (int, float):
            raise ValueError(f"{name} must be a number")
    if claims["iat"] > time.time() + LEEWAY_S:
        raise ValueError("iat is in the future")
    sub = claims["sub"]
    if not sub.strip() or not sub.isprintable() or len(sub) > MAX_SUBJECT_CHARS:
        raise ValueError(
            f"sub must have 1 to {MAX_SUBJECT_CHARS} printable characters that are not all blank"
        )
    return Principal(sub, granted(claims), quotas)
