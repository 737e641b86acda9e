"""Every setting, its environment variable and its default, as one frozen value.

Nothing is read at import: a process calls `load_settings(os.environ)` once, at its edge, and
passes the parts on. Secrets never show in a repr.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
from pydantic_core import ErrorDetails

from restoration.errors import InvalidSettings
from restoration.images import MEBIBYTE, UploadLimits


def _state_dir() -> Path:
    # Root's home is closed to the account that Postgres runs under then.
    return Path("/var/lib/comfy-restore" if os.geteuid() == 0 else "~/.local/state/comfy-restore")


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


S = TypeVar("S", bound="NodeSettings")


class NodeSettings(BaseModel):
    """What a machine needs to know to run an engine. The alias is the variable's name."""

    model_config = ConfigDict(
        frozen=True, populate_by_name=True, extra="ignore", validate_default=True
    )

    comfyui_url: str | None = Field(None, alias="COMFYUI_URL")
    comfyui_dir: Path | None = Field(None, alias="COMFYUI_DIR")
    comfyui_python: Path | None = Field(None, alias="COMFYUI_PYTHON")
    engine_variant: Literal["cpu", "cuda"] = Field("cpu", alias="ENGINE_VARIANT")
    engine_base_port: int = Field(8188, alias="ENGINE_BASE_PORT", gt=0, lt=65536)
    engine_start_timeout_s: float = Field(120, alias="ENGINE_START_TIMEOUT_S", gt=0)
    # An engine that runs a prompt and says nothing for so long is taken for hung.
    engine_stall_s: float = Field(300, alias="ENGINE_STALL_S", gt=0)
    # Started anew between two jobs after so many, or above so much memory (0: never).
    engine_restart_after_jobs: int = Field(1000, alias="ENGINE_RESTART_AFTER_JOBS", ge=0)
    engine_memory_limit_mb: int = Field(0, alias="ENGINE_MEMORY_LIMIT_MB", ge=0)
    # Big downloads, shared by every stack of this user; and the local stack's data and secrets.
    cache_dir: Path = Field(Path("~/.cache/comfy-restore"), alias="COMFY_RESTORE_CACHE")
    state_dir: Path = Field(default_factory=_state_dir, alias="COMFY_RESTORE_STATE")

    @field_validator("cache_dir", "state_dir", "comfyui_dir", "comfyui_python")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path else None


class Settings(NodeSettings):
    """Everything the service needs to know."""

    # Where state lives
    database_url: SecretStr = Field(alias="DATABASE_URL")
    redis_url: SecretStr = Field(alias="REDIS_URL")
    s3_bucket: str = Field(alias="S3_BUCKET")
    s3_endpoint_url: str | None = Field(None, alias="S3_ENDPOINT_URL")
    s3_region: str = Field("us-east-1", alias="AWS_REGION")
    # None leaves it to boto3: instance profile, shared credentials file, ...
    s3_access_key: str | None = Field(None, alias="AWS_ACCESS_KEY_ID")
    s3_secret_key: SecretStr | None = Field(None, alias="AWS_SECRET_ACCESS_KEY")
    cloudfront_domain: str | None = Field(None, alias="CLOUDFRONT_DOMAIN")

    # Who may come in
    auth0_domain: str | None = Field(None, alias="AUTH0_DOMAIN")
    auth0_audience: str | None = Field(None, alias="AUTH0_AUDIENCE")
    local_issuer_url: str | None = Field(None, alias="LOCAL_ISSUER_URL")

    # Other origins whose pages may call the API, separated by commas; none by default
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), alias="CORS_ORIGINS"
    )

    # What may come in, and how long a link to a result is good
    upload_max_bytes: int = Field(50 * MEBIBYTE, alias="UPLOAD_MAX_BYTES", gt=0)
    batch_max_bytes: int = Field(1024 * MEBIBYTE, alias="BATCH_MAX_BYTES", gt=0)
    upload_max_pixels: int = Field(16_000_000, alias="UPLOAD_MAX_PIXELS", gt=0)
    result_max_pixels: int = Field(100_000_000, alias="RESULT_MAX_PIXELS", gt=0)
    result_url_lifetime_s: int = Field(3600, alias="RESULT_URL_LIFETIME_S", gt=0)

    # The lease on a job: three heartbeats may be missed before another worker gets it
    heartbeat_s: float = Field(1.0, alias="HEARTBEAT_S", gt=0)
    lease_s: float = Field(4.0, alias="LEASE_S", gt=0)
    log_format: Literal["json", "console"] = Field("json", alias="LOG_FORMAT")

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError("LEASE_S must be at least twice HEARTBEAT_S")
        return self

    @model_validator(mode="after")
    def _one_issuer(self) -> Self:
        if bool(self.auth0_domain) != bool(self.auth0_audience):
            raise ValueError("AUTH0_DOMAIN and AUTH0_AUDIENCE must be set together")
        return self

    @property
    def upload_limits(self) -> UploadLimits:
        return UploadLimits(
            max_bytes=self.upload_max_bytes,
            max_pixels=self.upload_max_pixels,
            max_result_pixels=self.result_max_pixels,
        )


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from an environment; an empty variable counts as unset.

    Raises InvalidSettings, which names each variable and what is wrong with it.
    """
    return _load(Settings, environ)


def load_node_settings(environ: Mapping[str, str]) -> NodeSettings:
    """As `load_settings`, where neither Postgres nor Redis nor S3 need be known."""
    return _load(NodeSettings, environ)


def _load(kind: type[S], environ: Mapping[str, str]) -> S:
    try:
        return kind.model_validate({name: value for name, value in environ.items() if value})
    except ValidationError as error:
        raise InvalidSettings("; ".join(map(_describe, error.errors()))) from None


def _describe(problem: ErrorDetails) -> str:
    variable = ".".join(map(str, problem["loc"]))
    return f"{variable}: {problem['msg']}" if variable else problem["msg"]
