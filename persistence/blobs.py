"""BlobStore on S3, and the only place where an object's key is made.

Every object is written with the sha256 that we computed ourselves and is checked against it when
it is read. boto3 blocks, so its calls run on a few threads; its errors become ours here.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import quote
from uuid import UUID

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from restoration.errors import ArtifactCorrupt, DependencyUnavailable
from restoration.images import ImageType
from restoration.jobs import Artifact, AttemptRef, OutputFormat
from restoration.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef, ObjectIdentifierTypeDef

_T = TypeVar("_T")

_SUFFIXES = {
    ImageType.JPEG: "jpg",
    ImageType.PNG: "png",
    ImageType.WEBP: "webp",
    ImageType.TIFF: "tif",
    ImageType.BMP: "bmp",
}
_MISSING = {"NoSuchKey", "404"}
_EXISTS_ALREADY = {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}


INPUTS, OUTPUTS = "inputs/", "outputs/"
_OURS = re.compile(
    rf"(?:{INPUTS}|{OUTPUTS}(?=[^/]*/))([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})[./].*"
)
_LISTED_AT_ONCE = _DELETED_AT_ONCE = 1000  # as many as S3 allows in a call


def input_key(job_id: UUID, image_type: ImageType) -> str:
    """Inputs and outputs have a prefix each, since a bucket's lifecycle rules go by prefix."""
    return f"{INPUTS}{job_id}.{_SUFFIXES[image_type]}"


def output_key(ref: AttemptRef, output_format: OutputFormat) -> str:
    """Named after job and attempt, so that a late zombie cannot overwrite another's result."""
    suffix = _SUFFIXES[ImageType(output_format.content_type)]
    return f"{OUTPUTS}{ref.job_id}/{ref.attempt}.{suffix}"


def job_of(key: str) -> UUID | None:
    """The job for which an input's or output's key was made; None for no key of ours."""
    found = _OURS.fullmatch(key)
    return UUID(found[1]) if found else None


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
        cloudfront_domain: str | None = None,
        concurrency: int = 8,
    ) -> None:
        """With `cloudfront_domain` the results' URLs are plain ones on that domain: who may read
        there is up to the distribution."""
        self._bucket = bucket
        self._cloudfront_domain = cloudfront_domain
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="s3")

        def connect() -> S3Client:
            return boto3.client(
                "s3",
                endpoint_url=endpoint_url,
                region_name=region,
                aws_access_key_id=access_key,
                aws_secret_access_key=secret_key,
                config=_client_config(concurrency, own_endpoint=endpoint_url is not None),
            )

        # In a thread: boto3 reads its service descriptions from disk for a tenth of a second.
        self._client = self._threads.submit(connect)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        secret_key = settings.s3_secret_key
        return cls(
            settings.s3_bucket,
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
            access_key=settings.s3_access_key,
            secret_key=None if secret_key is None else secret_key.get_secret_value(),
            cloudfront_domain=settings.cloudfront_domain,
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
                ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            )
            return Artifact(key, digest.hexdigest(), len(data), content_type)

        return await self._run(work)

    async def get(self, artifact: Artifact) -> bytes:
        def work(client: S3Client) -> bytes:
            with _missing_is_corrupt(artifact):
                answer = client.get_object(Bucket=self._bucket, Key=artifact.key)
            with answer["Body"] as body:
                if answer["ContentLength"] != artifact.size_bytes:
                    raise _corrupt(artifact, f"it has {answer['ContentLength']} bytes")
                data = body.read()
            if hashlib.sha256(data).hexdigest() != artifact.sha256:
                raise _corrupt(artifact, "its sha256 is another")
            return data

        return await self._run(work)

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
        """Delivers as an attachment named `filename`; CloudFront's URL neither names nor ends."""
        if self._cloudfront_domain is not None:
            return f"https://{self._cloudfront_domain}/{quote(artifact.key)}"
        parameters = {
            "Bucket": self._bucket,
            "Key": artifact.key,
            "ResponseContentDisposition": _attachment(filename),
        }
        return await self._run(
            lambda client: client.generate_presigned_url(
                "get_object", Params=parameters, ExpiresIn=lifetime_s
            )
        )

    async def ping(self) -> None:
        await self._run(lambda client: client.head_bucket(Bucket=self._bucket))

    async def ensure_bucket(self) -> None:
        """Create the bucket unless it is there: for a local stack that starts empty."""

        def work(client: S3Client) -> None:
            try:
                client.create_bucket(Bucket=self._bucket)
            except ClientError as error:
                if _code(error) not in _EXISTS_ALREADY:
                    raise

        await self._run(work)

    async def aclose(self) -> None:
        """Wait for the calls that have begun, then close the connections."""
        await self._run(lambda client: client.close())
        await asyncio.to_thread(self._threads.shutdown)

    async def _run(self, work: Callable[[S3Client], _T]) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._call, work)

    def _call(self, work: Callable[[S3Client], _T]) -> _T:
        with _translated_errors():
            return work(self._client.result())


def _client_config(concurrency: int, *, own_endpoint: bool) -> Config:
    return Config(
        signature_version="s3v4",
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


def _attachment(filename: str) -> str:
    """RFC 6266: a plain name for every client, and the exact one for those that can read it."""
    plain = re.sub(r"[^ !#-\[\]-~]", "_", filename)  # ASCII without quote and backslash
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
