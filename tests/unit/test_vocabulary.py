"""The vocabulary: guarantees of transitions, events, images and settings."""

from __future__ import annotations

import pickle
from pathlib import Path
from uuid import UUID

import pytest

from restoration import errors, events, jobs
from restoration.errors import (
    ImageTooLarge,
    InvalidRequest,
    InvalidSettings,
    RestorationError,
    UnsupportedImage,
)
from restoration.images import (
    ImageType,
    UploadLimits,
    check_dimensions,
    check_result,
    check_size_bytes,
    sniff,
)
from restoration.jobs import TRANSITIONS, JobStatus, OutputFormat, sources_of
from restoration.settings import NodeSettings, load_settings

MINIMAL = {
    "DATABASE_URL": "postgresql+psycopg2://app:hunter2@db/app",
    "REDIS_URL": "redis://:hunter2@cache/0",
    "S3_BUCKET": "photos",
}


def every_error() -> list[type[RestorationError]]:
    members = vars(errors).values()
    return [
        kind for kind in members if isinstance(kind, type) and issubclass(kind, RestorationError)
    ]


@pytest.mark.parametrize("kind", every_error())
def test_an_error_survives_the_way_between_processes(kind: type[RestorationError]) -> None:
    """Every error arrives with its message and details after pickling."""
    arrived = pickle.loads(pickle.dumps(kind("what was wrong", job="a", tries=3)))  # noqa: S301
    assert type(arrived) is kind
    assert (arrived.message, arrived.details) == ("what was wrong", {"job": "a", "tries": 3})
    assert str(arrived) == "what was wrong"


def test_error_codes_are_told_apart_and_drawn() -> None:
    """No two errors share a code, and each is in the tree that the module draws."""
    codes = [kind.code for kind in every_error()]
    assert len(codes) == len(set(codes))
    assert errors.__doc__ is not None
    for kind in every_error():
        assert kind.__name__ in errors.__doc__


def test_final_states_are_final() -> None:
    """A job that has ended never changes again."""
    final = {status for status in JobStatus if status.is_final}
    assert final == {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    assert all(not TRANSITIONS[status] for status in final)


@pytest.mark.parametrize("source", JobStatus)
@pytest.mark.parametrize("target", JobStatus)
def test_a_state_is_a_source_of_those_it_may_change_to(
    source: JobStatus, target: JobStatus
) -> None:
    """`sources_of` follows the table exactly."""
    assert (source in sources_of(target)) is (target in TRANSITIONS[source])


@pytest.mark.parametrize(
    "event",
    [
        events.StateChanged(JobStatus.RUNNING, 2),
        events.Progressed(0.25, "ImageUpscaleWithModel", 1),
        events.Previewed.from_bytes(b"\xff\xd8", "image/jpeg", 1),
    ],
)
def test_events_survive_json(event: events.JobEvent) -> None:
    """An event read back from its JSON equals the one written."""
    assert events.from_json(events.to_json(event)) == event


def test_only_a_final_state_is_the_last_event() -> None:
    """Watchers stop at succeeded, failed and cancelled, and at no other state."""
    assert not events.is_last(events.Progressed(1.0, "storing", 1))
    for status in JobStatus:
        assert events.is_last(events.StateChanged(status, 1)) is status.is_final


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", ImageType.JPEG),
        (b"\x89PNG\r\n\x1a\n", ImageType.PNG),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", ImageType.WEBP),
        (b"II*\x00", ImageType.TIFF),
        (b"MM\x00*", ImageType.TIFF),
        (b"BM\x00\x00", ImageType.BMP),
        (b"II+\x00", ImageType.TIFF),
        (b"MM\x00+", ImageType.TIFF),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ImageType.HEIC),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix", ImageType.HEIC),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif", ImageType.AVIF),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", ImageType.AVIF),
    ],
)
def test_the_type_is_told_by_content(head: bytes, kind: ImageType) -> None:
    """The first bytes decide the type of a file."""
    assert sniff(head + bytes(32)) is kind


@pytest.mark.parametrize(
    "data", [b"GIF89a", b"%PDF-1.7", b"<svg/>", b"RIFF\x00\x00\x00\x00WAVE", b"\x00"]
)
def test_other_types_are_refused_with_what_would_be_right(data: bytes) -> None:
    """A file of another type is refused, and the error lists the accepted ones."""
    with pytest.raises(UnsupportedImage, match="JPEG, PNG, WebP, TIFF, BMP, HEIC or AVIF"):
        sniff(data)


def test_no_bytes_are_no_image() -> None:
    """The error for an empty upload says so, rather than naming a type."""
    with pytest.raises(InvalidRequest, match="empty"):
        sniff(b"")


def test_limits_allow_what_is_exactly_at_them() -> None:
    """The last allowed byte, pixel and side pass; the next is refused."""
    limits = UploadLimits(max_bytes=10, max_pixels=100, max_side=20)
    check_size_bytes(10, limits)
    check_dimensions(20, 5, limits)
    with pytest.raises(ImageTooLarge):
        check_size_bytes(11, limits)
    with pytest.raises(ImageTooLarge, match="pixels"):
        check_dimensions(11, 10, limits)
    with pytest.raises(ImageTooLarge, match="side"):
        check_dimensions(21, 1, limits)


@pytest.mark.parametrize(
    ("side", "scale", "output_format", "message"),
    [
        (4_096, 4, OutputFormat.WEBP, "choose png or a smaller scale"),
        (10_001, 1, OutputFormat.PNG, "choose a smaller scale"),
    ],
)
def test_a_result_that_cannot_be_made_is_refused_before_the_work(
    side: int, scale: int, output_format: OutputFormat, message: str
) -> None:
    """A result that no encoder could write, or larger than allowed, is refused with a remedy."""
    limits = UploadLimits(max_result_pixels=10_000 * 10_000 if scale == 1 else 10**9)
    check_result(side - 1, side - 1, scale, output_format, limits)
    with pytest.raises(ImageTooLarge, match=message):
        check_result(side, side, scale, output_format, limits)


def test_the_defaults_are_complete_but_for_where_state_lives() -> None:
    """Only Postgres, Redis and a bucket must be named."""
    settings = load_settings({**MINIMAL, "S3_ENDPOINT_URL": "", "UNRELATED": "x"})
    assert settings.s3_bucket == "photos"
    assert settings.s3_endpoint_url is None
    assert settings.upload_limits.max_bytes == 50 * 1024 * 1024


def test_secrets_do_not_show() -> None:
    """A password in a URL appears in no repr of the settings."""
    assert "hunter2" not in repr(load_settings(MINIMAL))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"DATABASE_URL": ""}, "DATABASE_URL: Field required"),
        ({"ENGINE_VARIANT": "tpu"}, "ENGINE_VARIANT: .*'cpu' or 'cuda'"),
        ({"LEASE_S": "1", "HEARTBEAT_S": "1"}, "LEASE_S must be at least twice HEARTBEAT_S"),
        ({"AUTH0_DOMAIN": "x.auth0.com"}, "AUTH0_DOMAIN and AUTH0_AUDIENCE"),
    ],
)
def test_wrong_settings_name_their_variable(wrong: dict[str, str], message: str) -> None:
    """A refused setting gives the variable and the expected value."""
    with pytest.raises(InvalidSettings, match=message):
        load_settings({**MINIMAL, **wrong})


def test_an_attempt_is_named_by_job_and_token() -> None:
    """Two attempts at one job differ in the fencing token."""
    job_id = UUID(int=1)
    assert jobs.AttemptRef(job_id, 1) != jobs.AttemptRef(job_id, 2)


def test_roots_state_lies_where_other_accounts_can_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres drops root, so root's default state folder is not below its closed home."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert NodeSettings().state_dir == Path("/var/lib/comfy-restore")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert NodeSettings().state_dir == Path.home() / ".local/state/comfy-restore"
