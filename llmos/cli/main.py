"""The `llmos` command. Each subcommand lives in a module of its own and imports what is slow when it runs."""

from __future__ import annotations

import sys
from importlib import metadata

import typer

from llmos.cli import (
    allocations,
    certs,
    chat,
    down,
    drain,
    embed,
    explain,
    generate,
    keys,
    kill,
    models,
    nice,
    nodes,
    output,
    ps,
    restart,
    top,
    trace,
    up,
)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="llmos",
    help="A fleet of workers that serves language models as one machine. Start with `llmos up`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("down")(down.down)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("embed")(embed.embed)
app.command("nodes")(nodes.nodes)
app.command("ps")(ps.ps)
app.command("top")(top.top)
app.command("kill")(kill.kill)
app.command("nice")(nice.nice)
app.command("drain")(drain.drain)
app.command("restart")(restart.restart)
app.command("trace")(trace.trace)
app.command("explain")(explain.explain)
app.command("certs")(certs.certs)
app.add_typer(models.app, name="models", help="The model store: list, show, import, remove.")
app.add_typer(allocations.app, name="allocations", help="Promises of resources to models and jobs: list, set, remove.")
app.add_typer(keys.app, name="keys", help="API keys: make, list, limit, remove.")


@app.command("version")
def version() -> None:
    """Show the version of this command."""
    output.write(f"llmos {metadata.version('llmos')}\n")


def main() -> None:
    """Entry point. Typed errors, what the system refuses, and input that is no text become one line on stderr and exit
    status 1; wrong usage exits with 2."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left; there is nobody to tell.
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    except Exception as problem:
        from llmos.errors import LlmosError

        if isinstance(problem, LlmosError):
            output.error(problem.message)
        elif isinstance(problem, OSError) and problem.strerror:
            output.error(f"{problem.strerror}: {problem.filename}" if problem.filename else problem.strerror)
        elif isinstance(problem, UnicodeError):
            output.error("the input is not UTF-8 text: convert it first, for example with `iconv`")
        else:
            raise
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
