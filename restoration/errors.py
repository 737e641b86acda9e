"""Every error that crosses a package or process boundary.

`code` is stable and shown to clients. `retryable` decides between another attempt and a failed
job. `serve_app.asgi.errors` maps the codes to HTTP statuses.

    RestorationError
    ├── InvalidRequest                invalid_request       the caller can correct it
    │   ├── UnsupportedImage          unsupported_image     not a supported type of image
    │   ├── BrokenImage               broken_image          a supported type that cannot be decoded
    │   ├── ImageTooLarge             image_too_large       more bytes or pixels than allowed
    │   ├── UploadTooSlow             upload_too_slow       the body arrived too slowly
    │   ├── BatchTooLarge             batch_too_large       more bytes or photos than allowed
    │   ├── BatchExpired              batch_expired         was not complete in time
    │   ├── InvalidParameters         invalid_parameters    details["problems"] lists each problem
    │   ├── UnknownWorkflow           unknown_workflow
    │   ├── GraphRefused              graph_refused         details["node"] names the node, if any
    │   └── InvalidWebhook            invalid_webhook       URL not allowed, or webhooks are off
    ├── Unauthenticated               unauthenticated
    ├── Forbidden                     insufficient_scope    details["scope"] is the missing scope
    ├── JobNotFound                   job_not_found         missing, or another owner's
    ├── BatchNotFound                 batch_not_found       missing, or another owner's
    ├── UploadNotFound                upload_not_found      missing, removed, or another owner's
    ├── WorkerNotFound                worker_not_found      never registered, or removed
    ├── Conflict
    │   ├── IdempotencyConflict       idempotency_conflict  the key was used for another request
    │   ├── UploadUsed                upload_used           the upload was used for another job
    │   ├── ResultNotReady            result_not_ready
    │   ├── ResultExpired             result_expired        the result was removed
    │   ├── InputExpired              input_expired         a retry needs the removed input
    │   └── IllegalTransition         illegal_transition
    ├── QueueFull                     queue_full            details["retry_after_s"]
    ├── StorageFull                   storage_full          details["retry_after_s"]
    ├── RateLimited                   rate_limited          details["retry_after_s"]
    ├── TooManyAtOnce                 too_many_at_once      details["retry_after_s"]
    │   └── TooManyUploads            too_many_uploads
    ├── QueueTimeout                  queue_timeout         did not start in time
    ├── LeaseLost                     lease_lost            the attempt no longer owns the job
    ├── EngineError
    │   ├── EngineUnavailable         engine_unavailable    retryable: does not start or answer
    │   ├── EngineCrashed             engine_crashed        retryable: exited during the job
    │   ├── EngineStalled             engine_stalled        retryable: runs, but sends no events
    │   ├── EngineOutOfMemory         engine_out_of_memory  retryable
    │   ├── EngineTimeout             engine_timeout        over the workflow's time limit
    │   ├── EngineRejected            engine_rejected       the graph did not validate
    │   ├── EngineFailed              engine_failed         a node raised
    │   └── EngineInterrupted         engine_interrupted    stopped on request
    ├── DependencyUnavailable         dependency_unavailable   retryable: Postgres, S3, Redis, ...
    ├── ArtifactCorrupt               artifact_corrupt      stored bytes differ from their sha256
    └── SetupError                    setup_error           the installation or its settings
        ├── InvalidSettings           invalid_settings
        ├── WorkflowInvalid           workflow_invalid
        ├── ModelMissing              model_missing
        └── ProvisionFailed           provision_failed

A job that fails because its workers were lost has the code `worker_lost`. It has no class, because
no process is left to raise it.

Each error takes one message and keyword details, and can be pickled between processes.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar


class RestorationError(Exception):
    """Root of the tree. `details` are plain JSON values, shown to the caller."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), self.message, **self.details), ()


class InvalidRequest(RestorationError):
    code = "invalid_request"


class UnsupportedImage(InvalidRequest):
    code = "unsupported_image"


class BrokenImage(InvalidRequest):
    code = "broken_image"


class ImageTooLarge(InvalidRequest):
    code = "image_too_large"


class UploadTooSlow(InvalidRequest):
    code = "upload_too_slow"


class BatchTooLarge(InvalidRequest):
    code = "batch_too_large"


class BatchExpired(InvalidRequest):
    code = "batch_expired"


class InvalidParameters(InvalidRequest):
    code = "invalid_parameters"


class UnknownWorkflow(InvalidRequest):
    code = "unknown_workflow"


class GraphRefused(InvalidRequest):
    code = "graph_refused"


class InvalidWebhook(InvalidRequest):
    code = "invalid_webhook"


class Unauthenticated(RestorationError):
    code = "unauthenticated"


class Forbidden(RestorationError):
    code = "insufficient_scope"


class JobNotFound(RestorationError):
    code = "job_not_found"


class BatchNotFound(RestorationError):
    code = "batch_not_found"


class UploadNotFound(RestorationError):
    code = "upload_not_found"


class WorkerNotFound(RestorationError):
    code = "worker_not_found"


class Conflict(RestorationError):
    code = "conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class UploadUsed(Conflict):
    code = "upload_used"


class ResultNotReady(Conflict):
    code = "result_not_ready"


class InputExpired(Conflict):
    code = "input_expired"


class ResultExpired(Conflict):
    code = "result_expired"


class IllegalTransition(Conflict):
    code = "illegal_transition"


class QueueFull(RestorationError):
    code = "queue_full"


class StorageFull(RestorationError):
    code = "storage_full"


class RateLimited(RestorationError):
    code = "rate_limited"


class TooManyAtOnce(RestorationError):
    code = "too_many_at_once"


class TooManyUploads(TooManyAtOnce):
    code = "too_many_uploads"


class QueueTimeout(RestorationError):
    code = "queue_timeout"


class LeaseLost(RestorationError):
    code = "lease_lost"


class EngineError(RestorationError):
    code = "engine_error"


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
    retryable = True


class EngineCrashed(EngineError):
    code = "engine_crashed"
    retryable = True


class EngineStalled(EngineError):
    code = "engine_stalled"
    retryable = True


class EngineOutOfMemory(EngineError):
    code = "engine_out_of_memory"
    retryable = True


class EngineTimeout(EngineError):
    code = "engine_timeout"


class EngineRejected(EngineError):
    code = "engine_rejected"


class EngineFailed(EngineError):
    code = "engine_failed"


class EngineInterrupted(EngineError):
    code = "engine_interrupted"


class DependencyUnavailable(RestorationError):
    code = "dependency_unavailable"
    retryable = True


class ArtifactCorrupt(RestorationError):
    code = "artifact_corrupt"


class SetupError(RestorationError):
    code = "setup_error"


class InvalidSettings(SetupError):
    code = "invalid_settings"


class WorkflowInvalid(SetupError):
    code = "workflow_invalid"


class ModelMissing(SetupError):
    code = "model_missing"


class ProvisionFailed(SetupError):
    code = "provision_failed"
