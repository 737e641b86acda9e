"""All settings, with their environment variables and defaults, as one frozen value.

Nothing is read at import: a process calls `load_settings(os.environ)` once at its entry point and
passes values on. Secrets never show in a repr. A secret NAME can also be given as NAME_FILE, the
path of a file that holds it, as container platforms mount secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from restoration.errors import InvalidSettings
from restoration.images import MEBIBYTE, UploadLimits
from restoration.limits.quotas import UPLOADING_BYTES, Quotas
from restoration.queue_policy import QueuePolicy
from restoration.webhooks.messages import secret_key
from restoration.webhooks.urls import WebhookRules

DAY_S = 24 * 3600
FILE_SUFFIX = "_FILE"
# Variable with the state folder, in the environment of every process of a local stack.
STACK_MARK = "COMFY_RESTORE_STACK"
# As browsers send it: lower case, nothing after the port. `*` and `null` would allow any page.
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]+)?", re.ASCII)
# Nodes of stock ComfyUI, except those that make several pictures of one or that take a picture's
# size from elsewhere.
PURE_IMAGE_NODES = (
    "LoadImage",
    "SaveImage",
    "UpscaleModelLoader",
    "ImageUpscaleWithModel",
    "ImageScale",
    "ImageScaleBy",
    "ImageScaleToTotalPixels",
    "ImageScaleToMaxDimension",
    "ImageCrop",
    "ImagePadForOutpaint",
    "ImageFlip",
    "ImageRotate",
    "ImageBlend",
    "ImageBlur",
    "ImageSharpen",
    "ImageInvert",
    "ImageQuantize",
)


def _state_dir() -> Path:
    # As root, Postgres runs under another account, which cannot read root's home.
    return Path("/var/lib/comfy-restore" if os.geteuid() == 0 else "~/.local/state/comfy-restore")


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


S = TypeVar("S", bound="NodeSettings")


class NodeSettings(BaseModel):
    """Settings to run an engine.

    A field's environment variable is its name in upper case, unless an alias says otherwise.
    """

    model_config = ConfigDict(
        alias_generator=str.upper,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        validate_default=True,
    )

    comfyui_url: str | None = None
    comfyui_dir: Path | None = None
    comfyui_python: Path | None = None
    # Folders of more workflows, and of custom nodes for engines that workers start themselves.
    workflows_dir: Path | None = None
    custom_nodes_dir: Path | None = None
    engine_variant: Literal["cpu", "cuda"] = "cpu"
    engine_base_port: int = Field(8188, gt=0, lt=65536)
    engine_start_timeout_s: float = Field(120, gt=0)
    # An engine that runs a prompt without an event for this long counts as stalled.
    engine_stall_s: float = Field(300, gt=0)
    # Workflow whose models are loaded before a worker takes its first job; empty: none.
    warm_up_workflow: str = "restore"
    # Jobs staged behind the one that executes: one keeps a GPU busy, more only wait longer.
    worker_depth: int = Field(1, ge=0)
    # The engine restarts between two jobs after this many, or above this much memory (0: never).
    engine_restart_after_jobs: int = Field(1000, ge=0)
    engine_memory_limit_mb: int = Field(0, ge=0)
    # How long running jobs may continue when the local stack stops; then they return to the queue.
    drain_s: float = Field(15, gt=0)
    # Large downloads, shared by all stacks of this user.
    cache_dir: Path = Field(Path("~/.cache/comfy-restore"), alias="COMFY_RESTORE_CACHE")
    # Data and secrets of the local stack.
    state_dir: Path = Field(default_factory=_state_dir, alias="COMFY_RESTORE_STATE")

    @field_validator(
        "cache_dir",
        "state_dir",
        "comfyui_dir",
        "comfyui_python",
        "workflows_dir",
        "custom_nodes_dir",
    )
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path else None


class Settings(NodeSettings):
    """All settings of the service."""

    # Storage
    database_url: SecretStr
    redis_url: SecretStr
    s3_bucket: str
    s3_endpoint_url: str | None = None
    s3_region: str = Field("us-east-1", alias="AWS_REGION")
    # None: boto3 finds credentials (instance profile, shared credentials file, ...)
    s3_access_key: str | None = Field(None, alias="AWS_ACCESS_KEY_ID")
    s3_secret_key: SecretStr | None = Field(None, alias="AWS_SECRET_ACCESS_KEY")
    # CloudFront in front of the bucket: set all three or none
    cloudfront_domain: str | None = None
    cloudfront_key_pair_id: str | None = None
    cloudfront_private_key: SecretStr | None = None

    # Authentication
    auth0_domain: str | None = None
    auth0_audience: str | None = None
    local_issuer_url: str | None = None

    # Other origins whose pages may call the API, separated by commas
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()

    # Limits of uploads and results, and the lifetime of a link to a result
    upload_max_bytes: int = Field(50 * MEBIBYTE, gt=0)
    batch_max_bytes: int = Field(1024 * MEBIBYTE, gt=0)
    upload_max_pixels: int = Field(16_000_000, gt=0)
    result_max_pixels: int = Field(100_000_000, gt=0)
    # Processes that decode uploads, per replica of the ingress. There and in workers, the largest
    # picture may take IMAGE_CPU_S seconds of CPU time, smaller ones proportionally less
    image_processes: int = Field(3, gt=0)
    image_cpu_s: float = Field(15, gt=0)
    result_url_lifetime_s: int = Field(3600, gt=0)

    # Time for a direct upload; the sweeper removes an unused one an hour later
    upload_url_lifetime_s: int = Field(900, gt=0, le=3600)

    # Node classes allowed in users' own graphs. Each is trusted not to write files, open
    # connections or run code, and to make one picture of one
    runs_allowed_nodes: Annotated[tuple[str, ...], BeforeValidator(_split)] = PURE_IMAGE_NODES

    # Limits of the queue and of concurrent requests, and the lifetime of idempotency keys
    max_waiting_jobs: int = Field(100_000, gt=0)
    # Limits of one owner, unless its token says otherwise (0: no limit). The defaults only stop a
    # runaway client; set all five where owners do not trust each other.
    max_requests_per_minute: int = Field(6_000, ge=0)
    max_waiting_per_owner: int = Field(10_000, ge=0)
    max_running_per_owner: int = Field(0, ge=0)
    max_stored_bytes_per_owner: int = Field(0, ge=0)
    max_uploading_bytes_per_owner: int = Field(UPLOADING_BYTES, ge=0)
    # Concurrent requests, per replica of the ingress. An owner gets another place only while more
    # are free than it holds, so one owner alone gets at most half of them.
    max_uploads_in_flight: int = Field(64, gt=0)
    max_event_streams: int = Field(2048, gt=0)
    max_waits: int = Field(1024, gt=0)
    max_downloads: int = Field(64, gt=0)
    # Bytes of uploads that a replica of the ingress holds in memory; by default ten of the largest
    # photos
    max_upload_bytes_in_flight: int | None = Field(None, gt=0)
    idempotency_ttl_s: float = Field(86_400, gt=0)
    # A batch job that has waited this long takes turns with interactive ones
    aging_s: float = Field(600, gt=0)
    # The secret that signs webhooks (none are sent without it); plain HTTP, for development; and
    # private networks that webhooks may reach, separated by commas
    webhook_secret: SecretStr | None = None
    webhook_allow_http: bool = False
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_split)] = ()

    # How long inputs, outputs and rows are kept after a job's end; 0: for ever
    retention_input_s: float = Field(7 * DAY_S, ge=0)
    retention_output_s: float = Field(30 * DAY_S, ge=0)
    retention_row_s: float = Field(90 * DAY_S, ge=0)

    # The lease on a job: by default it survives three missed heartbeats
    heartbeat_s: float = Field(1.0, gt=0)
    lease_s: float = Field(4.0, gt=0)
    # OTLP/HTTP collector for traces, by OpenTelemetry's own variable; without it nothing is traced
    otlp_endpoint: str | None = Field(None, alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    log_format: Literal["json", "console"] = "json"

    @field_validator("webhook_secret")
    @classmethod
    def _is_a_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            secret_key(secret.get_secret_value())
        return secret

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin; write it like https://example.com")
        return origins

    @model_validator(mode="after")
    def _are_consistent(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError("LEASE_S must be at least twice HEARTBEAT_S")
        if bool(self.auth0_domain) != bool(self.auth0_audience):
            raise ValueError("AUTH0_DOMAIN and AUTH0_AUDIENCE must be set together")
        parts = (self.cloudfront_domain, self.cloudfront_key_pair_id, self.cloudfront_private_key)
        if any(parts) and not all(parts):
            raise ValueError(
                "CLOUDFRONT_DOMAIN, CLOUDFRONT_KEY_PAIR_ID and CLOUDFRONT_PRIVATE_KEY must "
                "be set together, since all URLs of results are signed"
            )
        # A batch holds two photos at a time, and an owner may hold half of the bytes.
        if self.upload_bytes_in_flight < 4 * self.upload_max_bytes:
            raise ValueError(
                "MAX_UPLOAD_BYTES_IN_FLIGHT must be at least four times UPLOAD_MAX_BYTES"
            )
        return self

    @property
    def upload_bytes_in_flight(self) -> int:
        return self.max_upload_bytes_in_flight or 10 * self.upload_max_bytes

    @property
    def upload_limits(self) -> UploadLimits:
        return UploadLimits(
            max_bytes=self.upload_max_bytes,
            max_pixels=self.upload_max_pixels,
            max_result_pixels=self.result_max_pixels,
        )

    @property
    def queue_policy(self) -> QueuePolicy:
        return QueuePolicy(
            max_waiting=self.max_waiting_jobs,
            quotas=self.quotas,
            idempotency_ttl_s=self.idempotency_ttl_s,
            aging_s=self.aging_s,
        )

    @property
    def quotas(self) -> Quotas:
        return Quotas(
            requests_per_minute=self.max_requests_per_minute,
            waiting_jobs=self.max_waiting_per_owner,
            running_jobs=self.max_running_per_owner,
            stored_bytes=self.max_stored_bytes_per_owner,
            uploading_bytes=self.max_uploading_bytes_per_owner,
        )

    @property
    def webhook_rules(self) -> WebhookRules:
        return WebhookRules(
            enabled=self.webhook_secret is not None,
            allow_http=self.webhook_allow_http,
            networks=self.webhook_networks,
        )


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Load the settings from an environment; an empty variable counts as unset.

    Raises InvalidSettings, which names each wrong variable and its problem.
    """
    return _load(Settings, environ)


def load_node_settings(environ: Mapping[str, str]) -> NodeSettings:
    """Load only the engine's settings; those of Postgres, Redis and S3 may be unset.

    Raises InvalidSettings.
    """
    return _load(NodeSettings, environ)


def _load(kind: type[S], environ: Mapping[str, str]) -> S:
    values = {name: value for name, value in environ.items() if value}
    for field in kind.model_fields.values():
        name = str(field.alias)
        path = values.get(f"{name}{FILE_SUFFIX}")
        if path is None or field.annotation not in (SecretStr, SecretStr | None):
            continue
        if name in values:
            raise InvalidSettings(f"{name} and {name}{FILE_SUFFIX} are both set: set one of them")
        try:
            values[name] = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettings(f"{name}{FILE_SUFFIX}: cannot read {path}: {error}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = ((".".join(map(str, each["loc"])), each["msg"]) for each in error.errors())
        raise InvalidSettings(
            "; ".join(f"{variable}: {text}" if variable else text for variable, text in problems)
        ) from None
