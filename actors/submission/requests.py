"""Validates submissions without their pictures. Pure.

The workflow is one of the catalogue, or the caller's own graph, which the graph rules restrict. An
earlier job can be submitted again, under the current workflows and rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from uuid import UUID, uuid4

from actors.images.reader import ImageInfo
from restoration.errors import InvalidRequest
from restoration.images import UploadLimits, check_result
from restoration.jobs import Artifact, Job, JobOptions, NewJob, OutputFormat, ParamValue
from restoration.limits.quotas import Quotas
from restoration.reuse import Reuse
from restoration.webhooks.urls import WebhookRules, check_url
from workflows.catalog import Catalog, Workflow
from workflows.custom import custom_workflow, graph_of, params_of
from workflows.graph_sizes import check_sizes
from workflows.graphs import GraphRules, check_graph
from workflows.manifest import CUSTOM

MAX_NAME_CHARS = 255


@dataclass(frozen=True, slots=True)
class SubmissionRequest:
    """A caller's request, not yet validated.

    `image` is the file's bytes, or empty if `upload_id` names a direct upload. A `graph` of the
    caller's own replaces `workflow`. The output format and the limits default to the workflow's;
    requested limits, in seconds, may only be shorter.
    """

    owner: str
    image: bytes
    workflow: str = ""
    params: Mapping[str, object] = field(default_factory=dict)
    output_format: OutputFormat | None = None
    options: JobOptions = field(default_factory=JobOptions)
    queue_limit_s: float | None = None
    reuse: Reuse = Reuse.NEVER
    upload_id: UUID | None = None
    graph: Mapping[str, object] | None = None
    idempotency_key: str | None = None
    quotas: Quotas | None = None  # None: those of the settings


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A validated request, with what was left out of it filled in from its workflow."""

    request: SubmissionRequest
    workflow: Workflow
    params: Mapping[str, ParamValue]
    output_format: OutputFormat

    def job(self, job_id: UUID, photo: Artifact) -> NewJob:
        """Return the job to record for a stored photo."""
        manifest = self.workflow.manifest
        return NewJob(
            id=job_id,
            owner=self.request.owner,
            workflow=self.workflow.name,
            workflow_version=self.workflow.version,
            params=self.params,
            output_format=self.output_format,
            options=self.request.options,
            input=photo,
            max_attempts=manifest.max_attempts,
            queue_limit_s=self.request.queue_limit_s or manifest.queue_limit_s,
        )

    def digest(self, subject: bytes) -> str:
        """Return a SHA-256 in hex that is equal only for equal requests.

        `subject` is the picture, or text that identifies the pictures of a batch. The `reuse`
        option is not part of the digest, because it does not change the result asked for. Options
        with their default are left out: a release with a new option keeps the digests of requests
        that do not use it.
        """
        options = self.request.options
        chosen = {
            each.name: value
            for each in fields(options)
            if (value := getattr(options, each.name)) != each.default
        }
        asked = [
            self.workflow.name,
            dict(self.params),
            self.output_format,
            self.request.queue_limit_s,
            chosen,
        ]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode() + b"\0")
        digest.update(subject)  # a separate call: concatenating would copy the picture
        return digest.hexdigest()


class RequestChecker:
    """Validates requests against the catalogue and the rules. Stateless."""

    def __init__(
        self,
        catalog: Catalog,
        limits: UploadLimits,
        webhooks: WebhookRules,
        allowed_nodes: Collection[str],
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._webhooks = webhooks
        models = {model.name: model.scale for model in catalog.models() if model.scale is not None}
        self._graphs = GraphRules(frozenset(allowed_nodes), models)

    def check(self, request: SubmissionRequest) -> CheckedRequest:
        """Validate all but the picture. Raises InvalidRequest or a subclass."""
        _check_name("the owner", request.owner)
        if request.idempotency_key is not None:
            _check_name("Idempotency-Key", request.idempotency_key)
        if request.graph is not None:
            graph = check_graph(request.graph, self._graphs)
            workflow, params = custom_workflow(graph), params_of(graph)
        else:
            workflow = self._catalog.find(request.workflow)
            params = workflow.resolve(request.params)
        manifest = workflow.manifest
        output_format = request.output_format or manifest.output.default_format
        if output_format not in manifest.output.formats:
            raise InvalidRequest(
                f"the workflow {workflow.name} cannot write {output_format}; choose from "
                f"{', '.join(manifest.output.formats)}"
            )
        _check_limit("queue_limit_s", request.queue_limit_s, manifest.queue_limit_s)
        _check_limit("run_limit_s", request.options.run_limit_s, manifest.run_limit_s)
        if request.options.webhook_url is not None:
            check_url(request.options.webhook_url, self._webhooks)
        return CheckedRequest(request, workflow, params, output_format)

    def check_result(self, checked: CheckedRequest, picture: ImageInfo) -> None:
        """Check the size of the result. Raises ImageTooLarge or GraphRefused if it is too large."""
        width, height = picture.width, picture.height
        scale = checked.workflow.manifest.enlargement(checked.params)
        if checked.workflow.name == CUSTOM:
            graph = checked.workflow.graph
            width, height = check_sizes(graph, self._graphs, width, height, self._limits)
        check_result(width, height, scale, checked.output_format, self._limits)

    def again(self, source: Job) -> NewJob:
        """Return a new job with the same request and input as `source`.

        Its limits are cut to the workflow's current ones. Raises as `check`, because workflows and
        rules may have changed.
        """
        checked = self.check(
            SubmissionRequest(
                owner=source.owner,
                image=b"",
                workflow=source.workflow,
                params=source.params,
                graph=graph_of(source.params) if source.workflow == CUSTOM else None,
                output_format=source.output_format,
                options=replace(source.options, run_limit_s=None),
            )
        )
        manifest = checked.workflow.manifest
        waited_s = (source.queue_deadline_at - source.created_at).total_seconds()
        run_limit_s = source.options.run_limit_s
        return replace(
            checked.job(uuid4(), source.input),
            options=replace(
                source.options, run_limit_s=run_limit_s and min(run_limit_s, manifest.run_limit_s)
            ),
            queue_limit_s=min(waited_s, manifest.queue_limit_s),
            request_digest=source.request_digest,
            retry_of=source.id,
        )


def _check_limit(name: str, asked_s: float | None, limit_s: float) -> None:
    if asked_s is not None and not 0 < asked_s <= limit_s:
        raise InvalidRequest(
            f"{name} must be greater than 0 and at most {limit_s:g}, the workflow's limit in "
            "seconds"
        )


def _check_name(what: str, text: str) -> None:
    if not (0 < len(text) <= MAX_NAME_CHARS and text.isprintable()):
        raise InvalidRequest(f"{what} must have 1 to {MAX_NAME_CHARS} printable characters")
