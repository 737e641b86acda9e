"""BlobStore on S3.

Every object is written with the sha256 that we computed ourselves and is checked against it when
it is read. boto3 blocks, so its calls run on a few threads, which owners have in turns; its errors
become ours here.
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
from restoration.ports import NewUpload, UploadLink
from restoration.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef, ObjectIdentifierTypeDef

_T = TypeVar("_T")

_MISSING = {"NoSuchKey", "404", "InvalidRange"}  # the last: of an object that is shorter


_PIECE_BYTES = 1024 * 1024  # of an object that is read without being kept
_LISTED_AT_ONCE = _DELETED_AT_ONCE = 1000  # as many as S3 allows in a call


class S3BlobStore:
    """One bucket. Keys and secrets that are None are looked up by boto3 in its usual places."""

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
        """With `cloudfront`, results are delivered from there."""
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
            # To ask first whether a picture may come costs a round trip for each of them.
            client.meta.events.unregister("before-call.s3", add_expect_header)
            return client

        # In a thread: boto3 reads its service descriptions from disk for a tenth of a second.
        self._client = self._threads.begin(connect)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Raises InvalidSettings."""
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
        """Overwrites what is there. Raises DependencyUnavailable, as every method does."""

        def work(client: S3Client) -> Artifact:
            digest = hashlib.sha256(data)
            client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=data,
                ContentType=content_type,
                ContentDisposition=attachment(filename_of(key)),  # CloudFront delivers it as it is
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
                raise _corrupt(artifact, "its sha256 is another")
            return data

        return await self._run(work)

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        """A request of its own: no connection is held while the caller does without the next."""

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
        """S3 copies by itself, and says what it wrote; a server that does not is read back from."""

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
                raise _corrupt(artifact, "its sha256 is another")
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
        # By key, not by token: a listing goes on where it was, whatever is deleted meanwhile.
        return client.list_objects_v2(
            Bucket=self._bucket, Prefix=prefix, StartAfter=after, MaxKeys=_LISTED_AT_ONCE
        )

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        """Delivers as an attachment named `filename`; CloudFront, as `put` named it."""

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
        """Wait for the calls that have begun, then close the connections."""
        await self._run(lambda client: client.close())
        await self._threads.aclose()

    async def _run(self, work: Callable[[S3Client], _T]) -> _T:
        return await self._threads.run(partial(self._call, work))

    def _call(self, work: Callable[[S3Client], _T]) -> _T:
        with _translated_errors():
            return work(self._client.result())


def _client_config(concurrency: int, *, own_endpoint: bool) -> Config:
    return Config(
        signature_version="s3v4",
        user_agent="comfy-restore",  # boto3 puts its own together anew for each call, 0.4 ms
        # Servers other than AWS have no name for each bucket.
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        connect_timeout=3,
        read_timeout=20,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=concurrency,
        tcp_keepalive=True,
        # We send a sha256 and check it ourselves; not every server knows the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise DependencyUnavailable(f"S3: {error}", s3_code=_code(error)) from error
    except BotoCoreError as error:
        raise DependencyUnavailable(f"S3: {error}") from error


@contextmanager
def _missing_is_corrupt(artifact: Artifact) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code(error) not in _MISSING:
            raise
        raise _corrupt(artifact, "it is gone") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _corrupt(artifact: Artifact, reason: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"the object {artifact.key} is not what was stored: {reason}", key=artifact.key
    )
