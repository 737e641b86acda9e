"""Signed URLs that give temporary access to one object, to read a result or to upload.

The signature covers everything that a URL allows. S3's are SigV4 query authentication; CloudFront's
are a canned policy with RSA-SHA1, as CloudFront requires.
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
from restoration.ports.objects import NewUpload, UploadLink
from restoration.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def attachment(filename: str) -> str:
    """Return a Content-Disposition header (RFC 6266) with an ASCII and a UTF-8 file name."""
    plain = re.sub(r"[^ !#-\[\]-~]", "_", filename)  # ASCII without quote and backslash
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def result_link(
    client: S3Client, bucket: str, artifact: Artifact, filename: str, lifetime_s: int
) -> str:
    """Return a URL that serves the object as an attachment of the artifact's content type.

    The URL overrides the headers that are stored with the object.
    """
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
    """Return a link that accepts only this content type, this length and, if given, this sha256."""
    expires_at = datetime.now(UTC) + timedelta(seconds=lifetime_s)
    headers = {"Content-Type": upload.content_type}
    parameters: dict[str, Any] = {
        "Bucket": bucket,
        "Key": key,
        "ContentType": upload.content_type,
        "ContentLength": upload.size_bytes,
    }
    if upload.sha256 is not None:
        checksum = base64.b64encode(bytes.fromhex(upload.sha256)).decode()
        parameters["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = checksum
    url = client.generate_presigned_url("put_object", Params=parameters, ExpiresIn=lifetime_s)
    return UploadLink(url, headers, expires_at)


@dataclass(frozen=True, slots=True)
class CloudFront:
    """A CloudFront distribution that serves the bucket to holders of a signed URL."""

    domain: str
    signer: CloudFrontSigner

    @classmethod
    def from_settings(cls, settings: Settings) -> CloudFront | None:
        """Return the distribution, or None if none is set. Raises InvalidSettings for a bad key."""
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
            "CLOUDFRONT_PRIVATE_KEY cannot be read: it must be a PEM file without a password"
        ) from error
    if not isinstance(key, RSAPrivateKey):
        raise InvalidSettings("CLOUDFRONT_PRIVATE_KEY must be an RSA key")
    return key
