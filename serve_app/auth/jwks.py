"""Fetch and cache a token issuer's public keys (JWKS).

Keys that were fetched stay in use until a newer set replaces them, so tokens are still accepted
while the issuer is down. The rate of fetches is limited: tokens with invented key ids cannot flood
the issuer with requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import structlog
from jose import jwk
from jose.backends.base import Key
from jose.exceptions import JWKError
from jose.utils import base64_to_long
from pydantic import BaseModel, ConfigDict, Field

from restoration.errors import DependencyUnavailable, Unauthenticated

log = structlog.get_logger(__name__)

ALGORITHM = "RS256"
FETCH_TIMEOUT_S = 3.0
MIN_INTERVAL_S = 10.0
RETRY_S = 2.0
MAX_AGE_S = 600.0  # a key that the issuer withdraws is trusted at most this much longer


MIN_KEY_BITS = 2048  # RFC 7518, section 3.3


class _KeySetDocument(BaseModel):
    keys: list[Any]


class _PublicNumbers(BaseModel):
    """Modulus and exponent of an RSA key in base64url (RFC 7518, section 6.3).

    They have at most 16,384 and 64 bits.
    """

    model_config = ConfigDict(strict=True)

    n: str = Field(max_length=2732)
    e: str = Field(max_length=12)


class KeySet:
    """The keys at `url` (RFC 7517) that may sign RS256 tokens, by key id."""

    def __init__(
        self, url: str, http: httpx.AsyncClient, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._http = http
        self._clock = clock
        self._keys: Mapping[str, Key] = {}
        self._fetched_at = float("-inf")
        self._next_fetch_at = float("-inf")
        self._last_fetch_failed = False
        self._lock = asyncio.Lock()

    async def find(self, kid: str) -> Key:
        """Return the key with the id `kid`.

        Raises Unauthenticated if the issuer has no such key, and DependencyUnavailable if the
        issuer could not be reached.
        """
        key = self._keys.get(kid)
        if key is not None and (self._is_fresh() or self._lock.locked()):
            return key  # an old key is used while another task fetches
        async with self._lock:
            if kid not in self._keys or not self._is_fresh():
                await self._fetch_if_due()
        try:
            return self._keys[kid]
        except KeyError:
            if self._last_fetch_failed:
                raise self._unavailable() from None
            raise Unauthenticated("the token is signed with an unknown key") from None

    async def ping(self) -> None:
        """Raise DependencyUnavailable if there is no key to verify tokens with."""
        async with self._lock:
            if not self._keys:
                await self._fetch_if_due()
        if not self._keys:
            raise self._unavailable()

    def _is_fresh(self) -> bool:
        return self._clock() < self._fetched_at + MAX_AGE_S

    async def _fetch_if_due(self) -> None:
        if self._clock() < self._next_fetch_at:
            return
        try:
            self._keys = await self._fetch()
        except (httpx.HTTPError, ValueError) as error:  # ValueError: not a JWKS document
            log.warning("issuer_keys_not_fetched", url=self._url, reason=repr(error))
            self._last_fetch_failed = True
            self._next_fetch_at = self._clock() + RETRY_S
        else:
            self._last_fetch_failed = False
            self._fetched_at = self._clock()
            self._next_fetch_at = self._fetched_at + MIN_INTERVAL_S

    async def _fetch(self) -> dict[str, Key]:
        answer = await self._http.get(self._url, timeout=FETCH_TIMEOUT_S)
        answer.raise_for_status()
        document = _KeySetDocument.model_validate_json(answer.content)
        keys: dict[str, Key] = {}
        broken: ValueError | None = None
        for fields in filter(_signs_rs256, document.keys):
            try:
                keys[fields["kid"]] = _key_from(fields)
            except ValueError as error:
                log.warning("issuer_key_not_used", kid=fields["kid"], reason=str(error))
                broken = error
        if broken is not None and not keys:
            raise broken
        return keys

    def _unavailable(self) -> DependencyUnavailable:
        return DependencyUnavailable("the token issuer's keys cannot be fetched", url=self._url)


def _signs_rs256(fields: object) -> bool:
    return (
        isinstance(fields, dict)
        and fields.get("kty") == "RSA"
        and isinstance(fields.get("kid"), str)
        and fields.get("use", "sig") == "sig"
        and fields.get("alg", ALGORITHM) == ALGORITHM
    )


def _key_from(fields: Mapping[str, Any]) -> Key:
    """Return the RSA public key in a JWK.

    Raises ValueError for other kinds of key, and for fewer than MIN_KEY_BITS bits.
    """
    public = _PublicNumbers.model_validate(fields)
    try:
        if base64_to_long(public.n).bit_length() < MIN_KEY_BITS:
            raise ValueError(f"the key has fewer than {MIN_KEY_BITS} bits")
        # The algorithm is fixed here and not read from the document or the token, so an RS256 key
        # can never be used to verify an HMAC.
        return jwk.construct({"kty": "RSA", "n": public.n, "e": public.e}, ALGORITHM)
    except JWKError as error:
        raise ValueError(str(error)) from error
