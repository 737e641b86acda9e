"""BlobStore on S3.

Every object is written with a sha256 computed here, and checked against it when it is read. boto3
blocks, so its calls run on a few threads, which owners use in turns. Its errors are converted here.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.handlers import add_expect_header

from persistence.fair_threads import FairThreads
from persistence.objects.keys import filename_of
from persistence.objects.signed_urls import CloudFront, attachment, result_link, upload_link
from restoration.errors import ArtifactCorrupt, DependencyUnavailable
from restoration.jobs import Artifact
from restoration.ports.objects import NewUpload, UploadLink
from restoration.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef, ObjectIdentifierTypeDef

_T = TypeVar("_T")

_MISSING = {"NoSuchKey", "404", "InvalidRange"}  # InvalidRange: the object is shorter
_PIECE_BYTES = 1024 * 1024  # chunk size for hashing an object
_LISTED_AT_ONCE = _DELETED_AT_ONCE = 1000  # S3's limit for a call


class S3BlobStore:
    """BlobStore on one bucket. Methods raise DependencyUnavailable if S3 fails."""

    def __init__(
        self,
        bucket: str,
        *,
        endpoint_url: str | None = None,
        region: str = "us-east-1",
        access_key: str | None = None,
        secret_key: str | None = None,
        cloudfront: CloudFront | None = None,
        concurrency: int = 8,
    ) -> None:
        """Create the store, which connects on first use.

        boto3 looks up an access key or secret key of None in its usual places. With `cloudfront`,
        signed URLs of results lead there.
        """
        self._bucket = bucket
        self._cloudfront = cloudfront
        self._threads = FairThreads(concurrency, "S3")

        def connect() -> S3Client:
            client = boto3.client(
                "s3",
                endpoint_url=endpoint_url,
                region_name=region,
                aws_access_key_id=access_key,
                aws_secret_access_key=secret_key,
                config=_client_config(concurrency, own_endpoint=endpoint_url is not None),
            )
            # `Expect: 100-continue` costs a round trip for each upload.
            client.meta.events.unregister("before-call.s3", add_expect_header)
            return client

        # In a thread, because boto3 takes 0.1 s to read its service descriptions from disk.
        self._client = self._threads.begin(connect)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Create the store. Raises InvalidSettings for an unusable CloudFront key."""
        secret_key = settings.s3_secret_key
        return cls(
            settings.s3_bucket,
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
            access_key=settings.s3_access_key,
            secret_key=None if secret_key is None else secret_key.get_secret_value(),
            cloudfront=CloudFront.from_settings(settings),
        )

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact:
        """Store the object, replacing one at the same key. Raises DependencyUnavailable."""

        def work(client: S3Client) -> Artifact:
            digest = hashlib.sha256(data)
            client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=data,
                ContentType=content_type,
                ContentDisposition=attachment(filename_of(key)),  # CloudFront cannot override it
                ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            )
            return Artifact(key, digest.hexdigest(), len(data), content_type)

        return await self._run(work)

    async def get(self, artifact: Artifact) -> bytes:
        def work(client: S3Client) -> bytes:
            with _missing_is_corrupt(artifact):
                answer = client.get_object(Bucket=self._bucket, Key=artifact.key)
            with closing(answer["Body"]) as body:
                if answer["ContentLength"] != artifact.size_bytes:
                    raise _corrupt(artifact, f"it has {answer['ContentLength']} bytes")
                data = body.read()
            if hashlib.sha256(data).hexdigest() != artifact.sha256:
                raise _corrupt(artifact, "its sha256 differs")
            return data

        return await self._run(work)

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        """See BlobStore. Each call is one request, so no connection is held between calls."""

        def work(client: S3Client) -> bytes:
            with _missing_is_corrupt(artifact):
                answer = client.get_object(
                    Bucket=self._bucket, Key=artifact.key, Range=f"bytes={start}-{end - 1}"
                )
            with closing(answer["Body"]) as body:
                size = answer["ContentRange"].rpartition("/")[2]
                if size != str(artifact.size_bytes):
                    raise _corrupt(artifact, f"it has {size} bytes")
                return body.read()

        return await self._run(work)

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        """See BlobStore. S3 copies on the server and returns the sha256 of the copy.

        If the server returns none, the copy is read back to compute it.
        """

        def work(client: S3Client) -> Artifact:
            with _missing_is_corrupt(artifact):
                answer = client.copy_object(
                    Bucket=self._bucket,
                    Key=key,
                    CopySource={"Bucket": self._bucket, "Key": artifact.key},
                    MetadataDirective="REPLACE",
                    ContentType=artifact.content_type,
                    ContentDisposition=attachment(filename_of(key)),
                    ChecksumAlgorithm="SHA256",
                )
            written = answer["CopyObjectResult"].get("ChecksumSHA256")
            sha256 = base64.b64decode(written).hex() if written else self._sha256(client, key)
            if sha256 != artifact.sha256:
                client.delete_object(Bucket=self._bucket, Key=key)
                raise _corrupt(artifact, "its sha256 differs")
            return replace(artifact, key=key)

        return await self._run(work)

    def _sha256(self, client: S3Client, key: str) -> str:
        digest = hashlib.sha256()
        with closing(client.get_object(Bucket=self._bucket, Key=key)["Body"]) as body:
            for piece in body.iter_chunks(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    async def delete(self, key: str) -> None:
        await self._run(lambda client: client.delete_object(Bucket=self._bucket, Key=key))

    async def delete_many(self, keys: Sequence[str]) -> None:
        def work(client: S3Client) -> None:
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                objects: list[ObjectIdentifierTypeDef] = [
                    {"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]
                ]
                answer = client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
                )
                if errors := answer.get("Errors"):
                    raise DependencyUnavailable(f"S3: {errors[0]}", failed=len(errors))

        await self._run(work)

    async def list(self, prefix: str, older_than: datetime) -> AsyncIterator[Sequence[str]]:
        after = ""
        while True:
            page = await self._run(partial(self._page, prefix, after))
            found = page.get("Contents", [])
            yield [each["Key"] for each in found if each["LastModified"] < older_than]
            if not page["IsTruncated"]:
                return
            after = found[-1]["Key"]

    def _page(self, prefix: str, after: str, client: S3Client) -> ListObjectsV2OutputTypeDef:
        # By key, not by token, so that deletions in between do not disturb the listing.
        return client.list_objects_v2(
            Bucket=self._bucket, Prefix=prefix, StartAfter=after, MaxKeys=_LISTED_AT_ONCE
        )

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        """Return a URL that serves the object as an attachment named `filename`.

        CloudFront serves it with the name that `put` stored.
        """

        def work(client: S3Client) -> str:
            if self._cloudfront is not None:
                return self._cloudfront.result_link(artifact, lifetime_s)
            return result_link(client, self._bucket, artifact, filename, lifetime_s)

        return await self._run(work)

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        return await self._run(
            lambda client: upload_link(client, self._bucket, key, upload, lifetime_s)
        )

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        def work(client: S3Client) -> bytes | None:
            try:
                answer = client.get_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                if _code(error) not in _MISSING:
                    raise
                return None
            with closing(answer["Body"]) as body:
                return body.read(max_bytes + 1)

        return await self._run(work)

    async def ping(self) -> None:
        await self._run(lambda client: client.head_bucket(Bucket=self._bucket))

    async def aclose(self) -> None:
        """Close the connections, and wait for the calls that have begun."""
        await self._run(lambda client: client.close())
        await self._threads.aclose()

    async def _run(self, work: Callable[[S3Client], _T]) -> _T:
        def call() -> _T:
            try:
                return work(self._client.result())
            except ClientError as error:
                raise DependencyUnavailable(f"S3: {error}", s3_code=_code(error)) from error
            except BotoCoreError as error:
                raise DependencyUnavailable(f"S3: {error}") from error

        return await self._threads.run(call)


def _client_config(concurrency: int, *, own_endpoint: bool) -> Config:
    return Config(
        signature_version="s3v4",
        user_agent="comfy-restore",  # boto3 builds its default anew for each call, 0.4 ms
        # Servers other than AWS have no host name for each bucket.
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        connect_timeout=3,
        read_timeout=20,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=concurrency,
        tcp_keepalive=True,
        # The sha256 is sent and checked here; not every server supports boto3's default checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


@contextmanager
def _missing_is_corrupt(artifact: Artifact) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code(error) not in _MISSING:
            raise
        raise _corrupt(artifact, "it does not exist") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _corrupt(artifact: Artifact, reason: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"the object {artifact.key} differs from what was stored: {reason}", key=artifact.key
    )
