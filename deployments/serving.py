"""What `rayllm serve` does: starts the service, shows how far it is, and ends it in order."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from deployments.api import API
from deployments.config import ApiConfig, ServedModel
from deployments.openai_api import bind, find_models
from deployments.startup import forget, read_failure, read_progress
from rayllm.engine import placement, ray_private
from rayllm.errors import EngineDeadError, UsageError
from rayllm.progress import ProgressBar

APP = "rayllm"
POLL_S = 0.3
DRAIN_POLL_S = 0.2


def serve_until_stopped(
    config: ApiConfig, model: ServedModel, host: str = "127.0.0.1", port: int = 8000, address: str | None = None
) -> None:
    """Serves until SIGINT or SIGTERM; then refuses what is new, and ends when what runs has ended.

    `address`: of a Ray cluster that runs already; None starts Ray here. Raises `UsageError` for what cannot work and
    `EngineDeadError` when the service fails to start, or ends.
    """
    _check_host(host, config)
    if not (address or os.environ.get("RAY_ADDRESS")):  # Serve may run already on a cluster that is there
        _check_port(host, port)
    num_shards = model.tensor_parallel_size * (model.max_replicas or model.num_replicas)
    # A Ray that is started here runs Serve with fewer threads and hops, and with its logs in files only. This process
    # has imported Serve before: its own handles are to work without an event loop.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    arguments = {name: getattr(part, name) for part in (config, model) for name in part.names()}
    found: Future[Any] = Future()

    def find() -> None:
        try:
            found.set_result(find_models(arguments))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=find, daemon=True).start()  # it takes seconds, as does Ray
    started_ray = placement.connect(address, min_cpus=num_shards)
    stopped, deployed = threading.Event(), False
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
        signal.signal(number, lambda *_: stopped.set())
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if found.done() or not started_ray:
            found.result()  # raises, before Serve starts where it would stay
        _start_serve(host, port)
        if _status() is not None:
            raise UsageError(
                f"this cluster serves an application {APP!r} already: end its `rayllm serve`, or `serve shutdown`"
            )
        forget(APP)
        app, deployed = bind(*found.result()), True
        serve.run_many([serve.RunTarget(app, name=APP, route_prefix="/")], wait_for_applications_running=False)
        started = time.monotonic()
        if _wait(stopped):
            seconds = time.monotonic() - started
            reached = "127.0.0.1" if host == "0.0.0.0" else host
            print(f"{model.name} is served at http://{reached}:{port}/v1 (started in {seconds:.0f} s)", flush=True)
            _watch(stopped)
            _drain(config.drain_timeout_s)
    finally:
        if started_ray:
            ray.shutdown()
        elif deployed:
            with contextlib.suppress(Exception):
                serve.delete(APP)


def _check_host(host: str, config: ApiConfig) -> None:
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") != "0" and host != "0.0.0.0":
        raise UsageError(
            "RAY_SERVE_ENABLE_HA_PROXY makes Serve listen on all interfaces, HAProxy's statistics included: "
            "pass --host 0.0.0.0 if that is meant, or unset it",
            "host",
        )
    if host not in ("127.0.0.1", "localhost", "::1") and not config.api_keys:
        print(f"Warning: {host} is open to the network, and without --api-keys to everybody on it", file=sys.stderr)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen at {host}:{port} ({error}): choose another --host or --port", "port"
            ) from None


def _start_serve(host: str, port: int) -> None:
    serve.start(http_options={"host": host, "port": port})
    running_host, running_port = ray_private.serve_http_options()
    if (running_host, running_port) != (host, port):
        raise UsageError(
            f"Serve runs on this cluster already, at {running_host}:{running_port}: pass these as --host and --port",
            "host" if running_host != host else "port",
        )


def _status() -> Any:
    return serve.status().applications.get(APP)


def _wait(stopped: threading.Event) -> bool:
    """Returns when the service runs, True, or was stopped before, False; raises the error that ended its start."""
    with ProgressBar() as show:
        while not stopped.wait(POLL_S):
            app = _status()
            if app is not None and app.status == ApplicationStatus.RUNNING:
                return True
            if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED:
                raise _failure(app)
            if progress := read_progress(APP):
                show(progress)
    return False


def _failure(app: Any) -> Exception:
    """The error that ended the start, in one line."""
    if error := read_failure(APP):
        return error
    messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    return EngineDeadError(f"the service failed to start: {lines[-1] if lines else 'see the logs of Ray Serve'}")


def _watch(stopped: threading.Event) -> None:
    """Returns when a signal comes; Serve restarts what dies meanwhile."""
    while not stopped.wait(POLL_S):
        if _status() is None:
            raise EngineDeadError("the service was deleted")


def _drain(timeout_s: float) -> None:
    """New requests get 503 from now on; returns when the running ones have ended, or after `timeout_s`."""
    api = serve.get_deployment_handle(API, APP)
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(Exception):  # whatever is gone need not be waited for
        while time.monotonic() < deadline:
            response: Any = api.broadcast("drain")
            if not sum(response.results(timeout_s=5)):
                return
            time.sleep(DRAIN_POLL_S)
