"""The command `tidepool`. Every subcommand imports what it needs when it runs: `--help` is immediate."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from tidepool.author import Kind
from tidepool.deploy.commands import register
from tidepool.errors import TidepoolError
from tidepool.settings import Provider, prefect_settings_problem, repository

app = typer.Typer(
    name="tidepool",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the console script: a user's error becomes one sentence and exit code 1, without a traceback.

    A wrong command line is such an error too: Typer's own code for it, 2, means changes (`plan --detailed-exitcode`).
    """
    try:
        sys.exit(app(standalone_mode=False))
    except TidepoolError as error:
        typer.echo(f"tidepool: {error}", err=True)
    except PermissionError as error:
        typer.echo(f"tidepool: this user may not access {error.filename}: {error.strerror}", err=True)
    except typer.TyperException as error:
        message = error.format_message().replace("Value error, ", "")  # pydantic's words
        typer.echo(f"tidepool: {message}", err=True)
    except typer.Abort:
        typer.echo("tidepool: aborted", err=True)
    except Exception as error:
        if not (reason := prefect_settings_problem(error)):
            raise
        typer.echo(f"tidepool: {reason}", err=True)
    sys.exit(1)


def _called() -> str:
    """Return this command as the user can type it here: without its folder where the shell finds it."""
    command = Path(sys.argv[0]).absolute()
    if command.name != "tidepool" or shutil.which("tidepool") or not command.is_relative_to(Path.cwd()):
        return "tidepool"
    return str(command.relative_to(Path.cwd()))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("tidepool"))
        raise typer.Exit


@app.callback(help="A Git repository of Python flows as a production Prefect platform on Kubernetes.")
def options(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end."),
    ] = False,
) -> None:
    """Take the options of the command itself."""


@app.command()
def run(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the deployment, or a flow by its module, such as flows.csv_etl.flow.csv_etl; a flow need not "
            "be in prefect.yaml."
        ),
    ],
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="NAME=VALUE",
            help="Parameter of the flow, overrides prefect.yaml; may be repeated.",
        ),
    ] = None,
    environment: Annotated[
        str, typer.Option("--environment", "-e", help="Environment whose overlay is merged into prefect.yaml.")
    ] = "local",
    provider: Annotated[
        Provider | None, typer.Option(help="Where mapped tasks run. Default: TIDEPOOL_COMPUTE_PROVIDER.")
    ] = None,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Run everything in one process, mapped tasks one after the other and without the flow's timeout, so "
            "that breakpoint() works in each.",
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output; the log is on standard error.")
    ] = False,
) -> None:
    """Run a deployment's flow, or any flow, in this process.

    Paths in parameters are relative to the repository. The run is recorded by the Prefect server of PREFECT_API_URL,
    else by the demo's, else by one that is started for the run.

    Exit code: 0 the run is Completed, 1 otherwise, also if nothing was run.
    """
    from tidepool.local.run import run as run_deployment

    given = parameter or []
    raise typer.Exit(run_deployment(repository(), name, given, environment, provider, as_json=json, debug=debug))


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the flow and of its deployment, such as daily-orders.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="plain: in the flow's process; mapped: a Dask task run for each item; batched: many small items for "
            "each task run; dataframe: a Dask dataframe inside one task."
        ),
    ] = "plain",
    cron: Annotated[
        str, typer.Option(help='Schedule, five fields such as "30 6 * * *". Default: runs on request only.')
    ] = "",
    timezone: Annotated[str, typer.Option(help="Timezone of the schedule, such as Europe/Paris. Default: UTC.")] = "",
    owner: Annotated[str, typer.Option(help="Team that owns the deployment: its tag owner:….")] = "",
    tier: Annotated[str, typer.Option(help="How much depends on the deployment: its tag tier:….")] = "",
) -> None:
    """Create a flow that runs at once: module, pure functions, tests, sample, runbook, deployment.

    The files are those of an example, the mean of each group of a CSV, to be changed. It validates the repository
    before and after; if anything is wrong, no file is changed.

    Exit code: 0 created, 1 something is wrong and nothing was written.
    """
    from tidepool.author.new import Order
    from tidepool.author.new import new as create

    tags = {key: value for key, value in (("owner", owner), ("tier", tier)) if value}
    for each in create(repository(), Order(name, kind, cron, timezone, tags)):
        typer.echo(f"wrote {each}")
    typer.echo(f"no problems; next: {_called()} run {name}")


@app.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The new folder, whose name is the repository's.")],
    flow: Annotated[str, typer.Option(help="Name of its first flow.")] = "first-flow",
    owner: Annotated[str, typer.Option(help="Team that owns the flow: the deployment's tag owner:….")] = "platform",
    tidepool: Annotated[
        str,
        typer.Option(
            metavar="REQUIREMENT",
            help="How the repository installs tidepool: tidepool==VERSION, or the path of a wheel, which is copied "
            "there. Default: this version.",
        ),
    ] = "",
) -> None:
    """Create a repository that uses tidepool as a package, with one small flow.

    It is validated before it is moved to its place, and committed. `tidepool update` brings a newer template to it.

    Exit code: 0 created, 1 something is wrong and nothing was written.
    """
    from tidepool.author.init import init as create

    create(Path(folder), flow, owner, tidepool)
    typer.echo(f"wrote {folder}; next: cd {folder}, make setup, make demo")


@app.command()
def update() -> None:
    """Bring what this version writes for a new repository to one that `tidepool init` made; local changes are kept.

    The first flow is not touched. A conflict is marked in the file, as by `git merge`. Changes must be committed first.

    Exit code: 0 done or nothing to do; 1 there is a conflict, or something is wrong and nothing was written.
    """
    from tidepool.author.init import update as merge

    done = merge(repository())
    for path, word in done.items():
        typer.echo(f"{path}: {word}")
    if not done:
        typer.echo("nothing to do")
    if conflicts := list(done.values()).count("conflict"):
        typer.echo(
            f"in conflict: {conflicts}. Edit what is between <<<<<<< and >>>>>>>, then commit all files; "
            "`git stash --include-untracked` undoes the update"
        )
    raise typer.Exit(1 if conflicts else 0)


@app.command()
def chart(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder that is new, empty, or written by this command before.")
    ],
) -> None:
    """Write the Helm chart of this version, and the objects that a Kubernetes cluster needs once.

    They are in the folders chart, cluster (kubectl apply --server-side -k) and crds of DIR. An earlier version of them
    is replaced. The Makefile of a repository that `tidepool init` made calls it before it installs the platform.

    Exit code: 0 written, 1 something is wrong.
    """
    from tidepool.author.chart import write

    write(Path(folder))
    typer.echo(f"wrote {folder}/chart and {folder}/cluster")


@app.command()
def demo(
    leave: Annotated[
        bool,
        typer.Option("--exit", help="Stop the server when the last run ends (default when stdout is not a terminal)."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the Prefect server. Default: 4200 if free, otherwise any free port."
        ),
    ] = None,
) -> None:
    """Run all deployments on bundled samples, on this machine, and show them in the Prefect UI.

    Exit code: 0 all runs are Completed, 1 otherwise.
    """
    from tidepool.local.demo import demo as run_demo

    raise typer.Exit(run_demo(repository(), stay=not leave and sys.stdout.isatty(), port=port))


@app.command()
def render(
    environment: Annotated[str, typer.Option("--environment", "-e", help="production, or a name in environments/.")],
    image: Annotated[
        str | None,
        typer.Option(metavar="NAME@sha256:…", help="Use this existing image instead of building one."),
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Version of the deployments, for use outside of a Git checkout.")
    ] = None,
) -> None:
    """Print the prefect file of an environment, for `prefect deploy --all --prefect-file …`."""
    from tidepool.deploy.config import environments

    typer.echo(environments.to_yaml(environments.load(repository(), environment, image, version)), nl=False)


@app.command()
def reap(
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            "--namespace",
            "-n",
            help="Namespace of flow runs; may be repeated. Default: TIDEPOOL_OPERATOR_NAMESPACES, or the kubeconfig's.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Delete what flow runs have left behind on Kubernetes: one pass of the operator's loop, by hand.

    These are Dask clusters whose driver or Job is gone or has ended, or whose deadline is over, and worker groups,
    autoscalers, Deployments and Services without a cluster. Nothing without tidepool's labels is deleted, and nothing
    at all when a reading fails. It uses the kubeconfig, or in a pod its account.

    Exit code: 0 done, also if nothing was left behind; 1 otherwise.
    """
    from tidepool.operate.sweep.observation import ReadingError
    from tidepool.operate.sweep.reap import reap as reap_once

    try:
        report = reap_once(namespace or [], dry_run=dry_run)
    except ReadingError as error:
        typer.echo(f"tidepool: {error}; nothing was deleted", err=True)
        raise typer.Exit(1) from None
    typer.echo(report.json() if json else report.text())
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def exporter(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.")] = 8000,
) -> None:
    """Serve metrics of the Prefect server of PREFECT_API_URL to Prometheus, at /metrics, until it is stopped.

    The server is asked in the background, so that a scrape costs it nothing. docs/metrics.md lists the metrics. It also
    tells the targets of TIDEPOOL_NOTIFY_URLS, if there are any, which runs have failed (docs/on-call.md).

    Exit code: 0 stopped by SIGTERM or Ctrl-C; 1 it could not start.
    """
    from tidepool.operate.exporter.service import serve

    serve(host, port)


@app.command()
def status(
    run: Annotated[
        str,
        typer.Argument(
            metavar="[RUN]",
            help="Flow run: its id or the beginning of it, its name or its URL; or a deployment or flow, for its last "
            "run. Default: what is wrong now.",
        ),
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Print it again every 2 s, until the run has ended.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is wrong now, or how one flow run is: why, what to do, its items, its Job and pods.

    It reads the Prefect server of PREFECT_API_URL, or the demo's, and Kubernetes by the kubeconfig or a pod's account.
    A source that does not answer within TIDEPOOL_STATUS_TIMEOUT_SECONDS (2) is listed as unknown.

    Exit code: 0 nothing is wrong; 1 something is, the run is Failed or Crashed, or it could not be read.
    """
    from tidepool.local.server import demo_api
    from tidepool.operate.status.command import status as show

    raise typer.Exit(1 if show(run, demo_api(), watch=watch, as_json=json) else 0)


@app.command()
def doctor(
    notify: Annotated[bool, typer.Option("--notify", help="Send a test message to TIDEPOOL_NOTIFY_URLS.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that everything is there that a run needs, and say what to do about what is not.

    It looks at this machine, the Prefect server of PREFECT_API_URL or the demo's, the store, which it writes to, the
    targets of notifications, and Kubernetes by the kubeconfig or a pod's account. It changes nothing else.

    Exit code: 0 nothing is wrong; 1 something is. What could not be looked at is `unknown`, and not wrong.
    """
    import shutil

    from tidepool.local.server import demo_api
    from tidepool.operate import doctor as examination

    checks = examination.doctor(demo_api(), notify=notify)
    width = shutil.get_terminal_size((120, 0)).columns
    typer.echo(examination.as_json(checks) if json else examination.as_text(checks, width))
    raise typer.Exit(1 if any(each.word == "wrong" for each in checks) else 0)


@app.command()
def settings(
    explain: Annotated[bool, typer.Option("--explain", help="Say what each setting means.")] = False,
) -> None:
    """Print the effective settings and where each comes from; secrets are masked."""
    import shutil
    import textwrap

    from tidepool.settings import effective, meanings

    rows = effective()
    texts = meanings() if explain else {}
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    width = shutil.get_terminal_size((120, 0)).columns
    for name, value, origin in rows:
        typer.echo(f"{name:<{name_width}}  {value:<{value_width}}  {origin}")
        if explain:
            typer.echo(textwrap.fill(texts[name], width, initial_indent="    ", subsequent_indent="    "))


register(app)

if __name__ == "__main__":
    main()
