"""Addresses that open one object for a while, without a token: to read a result, or to upload.

Whatever an address allows is in its signature, so that nothing of it can be changed: SigV4 query
authentication for S3, a canned policy (RSA-SHA1, as CloudFront defines it) for CloudFront.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from botocore.signers import CloudFrontSigner
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from restoration.errors import InvalidSettings
from restoration.jobs import Artifact
from restoration.ports import NewUpload, UploadLink
from restoration.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def attachment(filename: str) -> str:
    """RFC 6266: a plain name for every client, and the exact one for those that can read it."""
    plain = re.sub(r"[^ !#-\[\]-~]", "_", filename)  # ASCII without quote and backslash
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def result_link(
    client: S3Client, bucket: str, artifact: Artifact, filename: str, lifetime_s: int
) -> str:
    """Delivers the object as an attachment of the artifact's type, whatever S3 says about it."""
    parameters = {
        "Bucket": bucket,
        "Key": artifact.key,
        "ResponseContentDisposition": attachment(filename),
        "ResponseContentType": artifact.content_type,
    }
    url: str = client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=lifetime_s)
    return url


def upload_link(
    client: S3Client, bucket: str, key: str, upload: NewUpload, lifetime_s: int
) -> UploadLink:
    """Takes an object of this type, this length and, if it is given, this sha256."""
    expires_at = datetime.now(UTC) + timedelta(seconds=lifetime_s)
    headers = {"Content-Type": upload.content_type}
    parameters: dict[str, Any] = {
        **{"Bucket": bucket, "Key": key},
        **{"ContentType": upload.content_type, "ContentLength": upload.size_bytes},
    }
    if upload.sha256 is not None:
        checksum = base64.b64encode(bytes.fromhex(upload.sha256)).decode()
        parameters["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = checksum
    url = client.generate_presigned_url("put_object", Params=parameters, ExpiresIn=lifetime_s)
    return UploadLink(url, headers, expires_at)


@dataclass(frozen=True, slots=True)
class CloudFront:
    """A distribution that serves the bucket to whoever has an address signed with this key."""

    domain: str
    signer: CloudFrontSigner

    @classmethod
    def from_settings(cls, settings: Settings) -> CloudFront | None:
        """None without a distribution. Raises InvalidSettings for a key that cannot be used."""
        domain, key_pair_id = settings.cloudfront_domain, settings.cloudfront_key_pair_id
        private_key = settings.cloudfront_private_key
        if domain is None or key_pair_id is None or private_key is None:
            return None
        key = _rsa_key(private_key.get_secret_value())

        def sign(message: bytes) -> bytes:
            return key.sign(message, PKCS1v15(), SHA1())  # noqa: S303 - what CloudFront verifies

        return cls(domain, CloudFrontSigner(key_pair_id, sign))

    def result_link(self, artifact: Artifact, lifetime_s: int) -> str:
        expires_at = datetime.now(UTC) + timedelta(seconds=lifetime_s)
        url = f"https://{self.domain}/{quote(artifact.key)}"
        signed: str = self.signer.generate_presigned_url(url, date_less_than=expires_at)
        return signed


def _rsa_key(pem: str) -> RSAPrivateKey:
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidSettings(
            "the private key for CloudFront cannot be read: PEM without a password is expected"
        ) from error
    if not isinstance(key, RSAPrivateKey):
        raise InvalidSettings("the private key for CloudFront must be an RSA key")
    return key
