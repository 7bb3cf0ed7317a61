"""What `llmos up` does: look before it leaps, start the fleet here or in the background, say where and how."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from llmos.cli import output, progress
from llmos.cli.answer import stream_answer
from llmos.config import environment
from llmos.errors import ConfigError, Conflict, MissingExtra, SourceError, Unavailable
from llmos.fleet.detach import start_detached
from llmos.fleet.etcd_server import find_etcd
from llmos.fleet.lock import already_runs
from llmos.fleet.options import DEFAULT_HTTP_PORT, FleetOptions, free_memory, make_folders, share_of, usable_cores
from llmos.fleet.plan import ServicePlan
from llmos.fleet.probe import accepts
from llmos.fleet.shutdown import is_running
from llmos.fleet.state import FleetState, read_state, remember_last_up, state_home
from llmos.fleet.supervisor import Supervisor
from llmos.nvidia import may_use_cards
from llmos.store import Manifest, Progress, Store
from llmos.store.default import DEFAULT_NAME, ensure_default
from llmos.store.planning import ensure_plan

ECHO_MODEL = "echo"
_ETCD_TIMEOUT_S = 3.0
# So that the first answer to a curious line comes within seconds on a laptop.
_EXAMPLE_TOKENS = 64
_EXTRAS = (("gateway", "starlette", "The gateway"), ("worker", "torch", "The torch backend"))


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt to answer as soon as the fleet is ready."""

    prompt: str
    max_tokens: int


def data_folder(given: Path | None) -> Path:
    """The folder as an absolute path: children and later commands run elsewhere."""
    return (given or state_home(environment())).absolute()


def prepare(options: FleetOptions, steps: output.Steps) -> FleetOptions:
    """Options with the model settled and everything found that the fleet needs. Imports the default model if missing.

    Raises Conflict if a fleet runs in the data folder, MissingExtra, ConfigError, ModelNotFound or SourceError.
    """
    state = read_state(options.data_dir)
    if state is not None and is_running(state):
        raise Conflict(already_runs(options.data_dir))
    if options.keys_file is not None and not options.keys_file.is_file():
        raise ConfigError(f"there is no keys file {options.keys_file}: `llmos keys` makes one", param="keys_file")
    for extra, module, purpose in _EXTRAS:
        if (extra != "worker" or options.backend == "torch") and importlib.util.find_spec(module) is None:
            raise MissingExtra(extra, purpose)
    if options.etcd:
        _expect_etcd(options.etcd)
    else:
        find_etcd(environment().get("PATH"))
    if options.backend == "echo":
        return replace(options, model=options.model or ECHO_MODEL)
    plans = options.precision == "auto" and not may_use_cards(options.device)
    return replace(options, model=_stored(options.model or DEFAULT_NAME, Store(options.store), steps, plans=plans))


def _expect_etcd(endpoints: tuple[str, ...]) -> None:
    if not any(accepts(endpoint, _ETCD_TIMEOUT_S) for endpoint in endpoints):
        raise Unavailable(f"no etcd answers at {', '.join(endpoints)}: see that it runs and that --etcd is right")


def _stored(names: str, store: Store, steps: output.Steps, *, plans: bool) -> str:
    """`names` as they are, once each is known to be in the store, with its precision plan if `plans`."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        steps.done()
        with progress.shown() as import_progress:
            entry = ensure_default(store, import_progress) if name == DEFAULT_NAME else store.resolve(name)
            if plans:
                _plan(store, entry, import_progress)
    return ",".join(wanted)


def _plan(store: Store, entry: Manifest, import_progress: Progress) -> None:
    try:
        ensure_plan(store, entry, import_progress)
    except SourceError as error:
        # The worker serves the model all the same.
        output.note(f"{entry.name} is served in fp32: {error.message}")


def serve_detached(options: FleetOptions, ask: Ask | None, steps: output.Steps) -> None:
    """Start the fleet in the background; return once it is ready and has answered."""
    make_folders(options)
    state = start_detached(options, steps)
    steps.done()
    _announce(state, options, stop=f"llmos down --data-dir {options.data_dir}")
    if ask is not None:
        _answer(state, ask)


def serve_here(options: FleetOptions, ask: Ask | None, *, once: bool, steps: output.Steps) -> None:
    """Serve until Ctrl-C, or with `once` until the prompt is answered. Raises KeyboardInterrupt if stopped before."""
    share = share_of(options.workers, usable_cores(), free_memory())
    supervisor = Supervisor(options, ServicePlan(options, share), steps, notify=output.note)
    done = asyncio.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)

        async def on_ready(state: FleetState) -> None:
            steps.done()
            if once:
                remember_last_up(state_home(environment()), options.data_dir)
            else:
                _announce(state, options, stop="Ctrl-C")
            if ask is not None:
                await asyncio.to_thread(_answer, state, ask)
            done.set()
            if once:
                stop.set()

        await supervisor.run(stop, on_ready)

    asyncio.run(serve())
    if not done.is_set():
        raise KeyboardInterrupt
    if not once:
        output.note("stopped the fleet")


def _answer(state: FleetState, ask: Ask) -> None:
    key = environment().get("LLMOS_API_KEY", "")
    for piece in stream_answer(state.http_url, key, state.models[0], ask.prompt, ask.max_tokens):
        output.write(piece)
    output.write("\n")


def _announce(state: FleetState, options: FleetOptions, *, stop: str) -> None:
    remember_last_up(state_home(environment()), options.data_dir)
    if options.http_port is None and urlsplit(state.http_url).port != DEFAULT_HTTP_PORT:
        output.note(f"port {DEFAULT_HTTP_PORT} is taken: this fleet has another; --http-port chooses one")
    embeds = options.backend == "torch" and "embed" in Store(options.store).resolve(state.models[0]).capabilities
    has_keys = options.keys_file is not None
    output.note(usage_text(state, has_keys=has_keys, logs=options.log_dir, stop=stop, embeds=embeds))


def usage_text(state: FleetState, *, has_keys: bool, logs: Path, stop: str, embeds: bool = False) -> str:
    """Where the fleet serves and how to ask it: a curl line, and three lines of Python. `embeds`: it makes vectors."""
    model, base = state.models[0], f"{state.http_url}/v1"
    key = "YOUR-KEY" if has_keys else "any"
    header = f" -H 'authorization: Bearer {key}'" if has_keys else ""
    route, body, call = _embedding_example(model) if embeds else _chat_example(model)
    return f"""
llmos serves {", ".join(state.models)}
  HTTP  {base}
  gRPC  {state.grpc_address}
  logs  {logs}
  stop  {stop}

  curl {base}{route}{header} -H 'content-type: application/json' -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="{base}", api_key="{key}")
  print({call})
"""


def _chat_example(model: str) -> tuple[str, str, str]:
    """Route, body and Python call of a chat."""
    message = '{"role": "user", "content": "Hello"}'
    body = f'{{"model": "{model}", "messages": [{message}], "max_tokens": {_EXAMPLE_TOKENS}}}'
    call = f'model="{model}", messages=[{message}], max_tokens={_EXAMPLE_TOKENS}'
    return "/chat/completions", body, f"client.chat.completions.create({call}).choices[0].message.content"


def _embedding_example(model: str) -> tuple[str, str, str]:
    """Route, body and Python call of an embedding."""
    call = f'client.embeddings.create(model="{model}", input="Hello").data[0].embedding'
    return "/embeddings", f'{{"model": "{model}", "input": "Hello"}}', call
