"""`llmos up`: start a fleet on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from llmos.cli import output
from llmos.cli.completion import stored_models

if TYPE_CHECKING:
    from llmos.cli.serving import Ask
    from llmos.fleet.options import FleetOptions

Workers = Annotated[int, typer.Option(help="Number of workers; they share cores and memory evenly.")]
Schedulers = Annotated[int, typer.Option(help="Number of schedulers; one leads, the others stand by.")]
Gateways = Annotated[int, typer.Option(help="Number of gateways; the first gets the ports given here.")]
Backend = Annotated[str, typer.Option(help="torch runs real models, echo makes up tokens.", metavar="torch|echo")]
Precision = Annotated[
    str,
    typer.Option(
        help="auto: what each model was measured to bear; or one precision for all.", metavar="auto|fp32|fp16|int8"
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto: graphics processors where torch can use them, the workers dealt out to them in turn; else the CPU.",
        metavar="auto|cpu|cuda|cuda:N",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Models to serve, comma-separated: names in the model store; by default the embedded one. "
        "For echo: any NAME, or NAME=40GiB to declare its weights.",
        autocompletion=stored_models,
    ),
]
HttpPort = Annotated[int | None, typer.Option(help="Port of the HTTP API; by default 8000, or a free one.")]
GrpcPort = Annotated[int | None, typer.Option(help="Port of the gRPC API; by default 8001, or a free one.")]
Etcd = Annotated[str, typer.Option(help="host:port of an existing etcd, comma-separated; by default one is started.")]
Detach = Annotated[bool, typer.Option(help="Serve in the background; return once the fleet is ready.")]
UpDataDir = Annotated[
    Path | None, typer.Option(help="Folder of etcd's data, logs and state; by default ~/.local/state/llmos.")
]
KeysFile = Annotated[Path | None, typer.Option(help="API keys that the gateways accept; by default any key.")]
EchoSpeed = Annotated[float | None, typer.Option(help="Speed of the echo backend per request.", min=0.001)]
Prompt = Annotated[str, typer.Option(help="Answer this once the fleet is ready, greedily.")]
Once = Annotated[bool, typer.Option("--once", help="Stop the fleet after the answer to --prompt.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of the answer to --prompt.")]
StartTimeout = Annotated[float, typer.Option(min=1.0, help="Most seconds until the fleet must be ready.")]


def up(
    workers: Workers = 1,
    schedulers: Schedulers = 1,
    gateways: Gateways = 1,
    backend: Backend = "torch",
    precision: Precision = "auto",
    device: Device = "auto",
    model: Model = "",
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    etcd: Etcd = "",
    detach: Detach = False,
    data_dir: UpDataDir = None,
    keys_file: KeysFile = None,
    echo_tokens_per_second: EchoSpeed = None,
    prompt: Prompt = "",
    once: Once = False,
    max_tokens: MaxTokens = 256,
    start_timeout: StartTimeout = 300.0,
) -> None:
    """Start a fleet on this machine.

    etcd, schedulers, workers and gateways run as processes on loopback, until Ctrl-C or, with --detach, `llmos down`.
    """
    _check(backend, precision, prompt, once=once, detach=detach)
    from llmos.cli import serving
    from llmos.fleet.options import FleetOptions

    options = FleetOptions(
        data_dir=serving.data_folder(data_dir),
        workers=workers,
        schedulers=schedulers,
        gateways=gateways,
        backend="echo" if backend == "echo" else "torch",
        precision=cast("Literal['auto', 'fp32', 'fp16', 'int8']", precision),
        device=device,
        model=model,
        http_port=http_port,
        grpc_port=grpc_port,
        etcd=tuple(part.strip() for part in etcd.split(",") if part.strip()),
        keys_file=None if keys_file is None else keys_file.absolute(),
        echo_tokens_per_second=echo_tokens_per_second,
        start_timeout_s=start_timeout,
    )
    ask = serving.Ask(prompt, max_tokens) if prompt else None
    _run(options, ask, detach=detach, once=once)


def _check(backend: str, precision: str, prompt: str, *, once: bool, detach: bool) -> None:
    if backend not in ("torch", "echo"):
        raise typer.BadParameter(f"'{backend}' is neither torch nor echo", param_hint="--backend")
    if precision not in ("auto", "fp32", "fp16", "int8"):
        raise typer.BadParameter(f"'{precision}' is none of auto, fp32, fp16 and int8", param_hint="--precision")
    if once and not prompt:
        raise typer.BadParameter("needs --prompt", param_hint="--once")
    if once and detach:
        raise typer.BadParameter("cannot go with --detach", param_hint="--once")


def _run(options: FleetOptions, ask: Ask | None, *, detach: bool, once: bool) -> None:
    from llmos.cli import serving

    steps = output.Steps()
    try:
        ready = serving.prepare(options, steps)
        if detach:
            serving.serve_detached(ready, ask, steps)
        else:
            serving.serve_here(ready, ask, once=once, steps=steps)
    finally:
        steps.done()
