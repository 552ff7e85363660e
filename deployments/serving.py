"""What `rayllm serve` does: starts the service, says how it is, and ends it in order."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from deployments.api import API
from deployments.config import ApiConfig, ServedModel
from deployments.engine import ENGINE
from deployments.link import GONE
from deployments.openai_api import bind, find_models
from deployments.report import Report
from deployments.startup import forget, placing, read_failure, read_progress
from rayllm.command_line import STARTED
from rayllm.config import EngineConfig
from rayllm.engine import placement, ray_private
from rayllm.errors import EngineDeadError, UsageError
from rayllm.progress import Progress, ProgressBar

APP = "rayllm"
POLL_S = 0.3
DRAIN_POLL_S = 0.2
READY_TIMEOUT_S = 5.0


def serve_until_stopped(
    api: ApiConfig, model: ServedModel, host: str = "127.0.0.1", port: int = 8000, address: str | None = None
) -> None:
    """Serves until SIGINT or SIGTERM; then refuses what is new, and ends when what runs has ended, at a second signal
    at once.

    `address`: of a Ray cluster that runs already; None starts Ray here. Raises `UsageError` for what cannot work and
    `EngineDeadError` when the service fails to start, or ends.
    """
    api = api.with_keys_read()
    _check_host(host, api)
    if not (address or os.environ.get("RAY_ADDRESS")):  # Serve may run already on a cluster that is there
        _check_port(host, port)
    api, found = find_models(api, [model])
    num_shards = model.tensor_parallel_size * (model.max_replicas or model.num_replicas)
    # A Ray that is started here runs Serve with fewer threads and hops, and with its logs in files only. This process
    # has imported Serve before: its own handles are to work without an event loop.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    started_ray = placement.connect(address, min_cpus=num_shards)
    stopped, deployed, drained = threading.Event(), False, False

    def stop(*_: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
        signal.signal(number, stop)
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        app = bind(api, found)  # raises, before Serve starts where it would stay
        _start_serve(host, port)
        while (earlier := _status()) is not None:
            if earlier.status != ApplicationStatus.DELETING:
                raise UsageError(
                    f"this cluster serves an application {APP!r} already: end its `rayllm serve`, or `serve shutdown`"
                )
            if stopped.wait(POLL_S):
                return
        forget(APP)
        deployed = True
        serve.run_many([serve.RunTarget(app, name=APP, route_prefix="/")], wait_for_applications_running=False)
        config = model.resolve(found[0][1].config, placement.choose_device(model.device))
        if _wait(stopped, config, model.num_replicas):
            seconds = time.monotonic() - STARTED
            reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            print(f"{model.name} is served at http://{_at(reached, port)}/v1 (started in {seconds:.0f} s)")
            print(f"Logs are in {ray_private.log_folder()}/serve", flush=True)
            report = Report(APP, model.name, api.log_requests)
            _watch(stopped, report)
            _drain(api.drain_timeout_s, report)
        drained = True
    finally:
        if started_ray:
            ray.shutdown()
        elif deployed:
            with contextlib.suppress(Exception):
                serve.delete(APP, _blocking=drained)


def _check_host(host: str, api: ApiConfig) -> None:
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") != "0" and host != "0.0.0.0":
        raise UsageError(
            "RAY_SERVE_ENABLE_HA_PROXY makes Serve listen on all interfaces, HAProxy's statistics included: "
            "pass --host 0.0.0.0 if that is meant, or unset it",
            "host",
        )
    if not _is_loopback(host) and not api.api_keys:
        print(f"Warning: {host} is open to the network, and without API keys to everybody on it", file=sys.stderr)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _at(host: str, port: int) -> str:
    """Both, as they stand in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen at {_at(host, port)} ({error}): choose another --host or --port", "port"
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


def _wait(stopped: threading.Event, config: EngineConfig, num_engines: int) -> bool:
    """Returns when the service runs, True, or was stopped before, False; raises the error that ended its start."""
    places = placing(APP, ENGINE, config, num_engines)
    with ProgressBar() as show:
        while not stopped.wait(POLL_S):
            app = _status()
            if app is not None and app.status == ApplicationStatus.RUNNING and _is_ready():
                return True
            if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED:
                raise _failure(app)
            show(next(places, None) or read_progress(APP) or Progress("starting"))
    return False


def _is_ready() -> bool:
    """Whether all that answers HTTP has found its engines; Serve does not wait for that."""
    response: Any = serve.get_deployment_handle(API, APP).broadcast("is_ready")
    try:
        return all(response.results(timeout_s=READY_TIMEOUT_S))
    except (TimeoutError, *GONE):
        return False


def _failure(app: Any) -> Exception:
    """The error that ended the start, in one line."""
    if error := read_failure(APP):
        return error
    messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    reason = lines[-1] if lines else "Serve does not say why"
    return EngineDeadError(f"the service failed to start: {reason} (logs are in {ray_private.log_folder()}/serve)")


def _watch(stopped: threading.Event, report: Report) -> None:
    """Returns when a signal comes; Serve restarts what dies meanwhile."""
    while not stopped.wait(POLL_S):
        if _status() is None:
            raise EngineDeadError("the service was deleted")
        report.tell()


def _drain(timeout_s: float, report: Report) -> None:
    """New requests get 503 from now on; returns when the running ones have ended, or after `timeout_s`."""
    api = serve.get_deployment_handle(API, APP)
    deadline, is_told = time.monotonic() + timeout_s, False
    with contextlib.suppress(Exception):  # whatever is gone need not be waited for
        while time.monotonic() < deadline:
            response: Any = api.broadcast("drain")
            number = sum(response.results(timeout_s=5))
            report.tell()
            if not number:
                return
            if not is_told:
                requests = "1 request" if number == 1 else f"{number} requests"
                print(
                    f"Waiting for {requests} to end, at most {timeout_s:g} s; a second signal ends at once", flush=True
                )
                is_told = True
            time.sleep(DRAIN_POLL_S)
