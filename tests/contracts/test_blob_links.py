"""Links that work without a token, and allow only the action that their signature names."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from persistence.objects.s3 import S3BlobStore
from persistence.objects.signed_urls import CloudFront
from restoration.errors import InvalidSettings
from restoration.jobs import Artifact
from restoration.ports.objects import BlobStore, NewUpload, UploadLink
from restoration.settings import load_settings
from tests.conftest import S3Access
from tests.fakes.stores import MemoryBlobStore

DATA = bytes(range(256)) * 4
SHA256 = hashlib.sha256(DATA).hexdigest()
UPLOAD = NewUpload("image/png", len(DATA), SHA256)


def _s3(s3: S3Access, **changes: Any) -> S3BlobStore:
    return S3BlobStore(
        s3.bucket,
        endpoint_url=s3.endpoint_url,
        access_key=s3.access_key,
        secret_key=s3.secret_key,
        **changes,
    )


@pytest.fixture
async def store(s3: S3Access) -> AsyncIterator[S3BlobStore]:
    store = _s3(s3)
    yield store
    await store.aclose()


@pytest.fixture
def key() -> str:
    return f"uploads/{'0' * 64}/{uuid4()}"


async def send(
    link: UploadLink, data: bytes = DATA, url: str | None = None, **headers: str | None
) -> int:
    """Send the PUT that the link describes, with these changes, and return the status. A header of
    None is left out."""
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name: value for name, value in {**link.headers, **changed}.items() if value is not None}
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.put(url or link.url, content=data, headers=sent)).status_code


@pytest.mark.uploads
async def test_an_upload_is_written_by_its_link(store: S3BlobStore, key: str) -> None:
    """A PUT with the link's headers and no credentials stores an object that can be fetched."""
    link = await store.upload_link(key, UPLOAD, 60)
    assert await send(link) == 200
    assert await store.fetch(key, len(DATA)) == DATA


@pytest.mark.uploads
@pytest.mark.parametrize(
    "attack",
    [
        {"data": DATA + b"x"},
        {"data": DATA[:-1]},
        {"data": DATA[::-1]},  # same length, other picture
        {"Content_Type": "text/html"},
        {"Content_Type": None},
        {"x_amz_checksum_sha256": base64.b64encode(bytes(32)).decode()},
        {"x_amz_acl": "public-read"},
        {"x_amz_meta_owner": "somebody"},
    ],
    ids=["longer", "shorter", "other bytes", "type", "no type", "sha256", "public", "metadata"],
)
async def test_a_link_takes_only_what_was_announced(
    store: S3BlobStore, key: str, attack: Mapping[str, Any]
) -> None:
    """The signature covers type, length and sha256, so that S3 itself refuses anything else."""
    link = await store.upload_link(key, UPLOAD, 60)
    assert await send(link, **attack) in {400, 403}
    assert await store.fetch(key, 10_000) is None


@pytest.mark.uploads
async def test_a_link_is_for_one_key_one_method_and_a_while(store: S3BlobStore, key: str) -> None:
    """It works neither for another object, nor for reading or deleting, nor after its lifetime."""
    link, other = await store.upload_link(key, UPLOAD, 60), f"uploads/{'0' * 64}/{uuid4()}"
    assert await send(link, url=link.url.replace(key, other)) == 403
    assert await send(link, url=link.url.replace("X-Amz-Expires=60", "X-Amz-Expires=600")) == 403
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(link.url)).status_code == 403
        assert (await client.delete(link.url)).status_code == 403
    short = await store.upload_link(key, UPLOAD, 1)
    async with asyncio.timeout(300):
        while await send(short) == 200:  # noqa: ASYNC110 - the server's clock
            await asyncio.sleep(0.2)


@pytest.mark.uploads
async def test_a_length_is_enough(store: S3BlobStore, key: str) -> None:
    """The sha256 is optional; without it the length still counts."""
    link = await store.upload_link(key, NewUpload("image/png", len(DATA)), 60)
    assert await send(link, DATA + b"x") == 403
    assert await send(link, DATA[::-1]) == 200


@pytest.mark.uploads
@pytest.mark.parametrize("kind", ["s3", "memory"])
async def test_what_is_fetched_is_bounded(s3: S3Access, key: str, kind: str) -> None:
    """At most one byte more than allowed is read, which shows that the object is too large."""
    store: BlobStore = _s3(s3) if kind == "s3" else MemoryBlobStore()
    assert await store.fetch(key, 10) is None
    for data in (DATA, b""):
        await store.put(key, data, "image/png")
        assert await store.fetch(key, len(DATA)) == data
        assert await store.fetch(key, 9) == data[:10]
    if isinstance(store, S3BlobStore):
        await store.aclose()


@pytest.mark.results
async def test_what_is_delivered_is_an_attachment_of_its_own_type(
    store: S3BlobStore,
) -> None:
    """The signature fixes the type; the object has a file name of its own, for CloudFront."""
    job_id = uuid4()
    artifact = await store.put(f"outputs/{job_id}/1.png", DATA, "text/html")
    pinned = Artifact(artifact.key, artifact.sha256, artifact.size_bytes, "image/png")
    url = await store.signed_url(pinned, "mine.png", 60)
    plain = url.replace("response-content-type=image%2Fpng", "response-content-type=text%2Fhtml")
    assert plain != url
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(url)
        assert (await client.get(plain)).status_code == 403
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"].startswith('attachment; filename="mine.png"')
    stored = await asyncio.to_thread(_stored_disposition, store, artifact.key)
    assert stored.startswith(f'attachment; filename="restored-{job_id}.png"')


def _stored_disposition(store: S3BlobStore, key: str) -> str:
    client = store._client.result()
    return client.head_object(Bucket=store._bucket, Key=key)["ContentDisposition"]


# --- CloudFront


@pytest.fixture(scope="module")
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def environ(**changes: str) -> dict[str, str]:
    return {"DATABASE_URL": "d", "REDIS_URL": "r", "S3_BUCKET": "photos", **changes}


def cloudfront(key: str) -> dict[str, str]:
    return environ(
        CLOUDFRONT_DOMAIN="cdn.example.org",
        CLOUDFRONT_KEY_PAIR_ID="K2JCJMDEHXQW5F",
        CLOUDFRONT_PRIVATE_KEY=key,
    )


def verified(url: str, key: rsa.RSAPrivateKey) -> bool:
    """Verify a canned policy as CloudFront does, over exactly this text with the requested URL."""
    resource, _, _ = url.partition("?")
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    when = {"DateLessThan": {"AWS:EpochTime": int(query["Expires"])}}
    policy = {"Statement": [{"Resource": resource, "Condition": when}]}
    signature = query["Signature"].replace("-", "+").replace("_", "=").replace("~", "/")
    text = json.dumps(policy, separators=(",", ":")).encode()
    try:
        key.public_key().verify(base64.b64decode(signature), text, PKCS1v15(), SHA1())  # noqa: S303
    except InvalidSignature:
        return False
    return query["Key-Pair-Id"] == "K2JCJMDEHXQW5F"


@pytest.mark.results
async def test_cloudfronts_urls_are_signed(s3: S3Access, private_key: rsa.RSAPrivateKey) -> None:
    """A canned policy signs the URL and its end, so that neither can be changed."""
    store = _s3(
        s3, cloudfront=CloudFront.from_settings(load_settings(cloudfront(pem(private_key))))
    )
    artifact = Artifact("outputs/a b/1.png", "0" * 64, 1, "image/png")
    url = await store.signed_url(artifact, "a.png", lifetime_s=60)
    assert url.startswith("https://cdn.example.org/outputs/a%20b/1.png?Expires=")
    assert verified(url, private_key)
    assert not verified(url.replace("1.png", "2.png"), private_key)
    assert not verified(url.replace("Expires=", "Expires=9"), private_key)
    await store.aclose()


@pytest.mark.results
def test_cloudfronts_key_may_be_a_file(tmp_path: Path, private_key: rsa.RSAPrivateKey) -> None:
    """The secret can be kept out of the environment."""
    (tmp_path / "key.pem").write_text(pem(private_key))
    named = cloudfront("") | {"CLOUDFRONT_PRIVATE_KEY_FILE": str(tmp_path / "key.pem")}
    assert CloudFront.from_settings(load_settings(named)) is not None
    assert CloudFront.from_settings(load_settings(environ())) is None


@pytest.mark.results
@pytest.mark.parametrize(
    "changes",
    [
        {"CLOUDFRONT_KEY_PAIR_ID": ""},
        {"CLOUDFRONT_PRIVATE_KEY": ""},
        {"CLOUDFRONT_KEY_PAIR_ID": "", "CLOUDFRONT_PRIVATE_KEY": ""},
        {"CLOUDFRONT_DOMAIN": ""},
    ],
    ids=["no id", "no key", "neither", "no domain"],
)
def test_cloudfront_without_a_signature_is_refused(changes: dict[str, str]) -> None:
    """Without signatures results would be open to anyone who guesses a URL, or closed to
    everyone."""
    with pytest.raises(InvalidSettings, match="must be set together"):
        load_settings(cloudfront("secret") | changes)


@pytest.mark.results
@pytest.mark.parametrize("kind", ["garbage", "elliptic"])
def test_a_key_that_cannot_sign_is_refused_at_the_start(kind: str) -> None:
    """It is refused before the first result, with a message that does not repeat the key."""
    found = cloudfront("hunter2-not-a-key")
    if kind == "elliptic":
        found = cloudfront(pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(InvalidSettings) as refusal:
        S3BlobStore.from_settings(load_settings(found))
    assert "hunter2" not in str(refusal.value)
