"""`python -m rlora_lab serve`: Ray and the server of adapters on this machine alone."""

import logging
import os
import re
import signal
import socket
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..errors import LabError
from .releases import RELEASE, names_of, read_current

CONFIG = Path(__file__).with_name("serve.yaml")
MEMORY = 256 * 2**20  # bytes that Ray shares between processes; requests need next to none

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere


def read_config(path: Path = CONFIG) -> tuple[dict, dict[str, dict]]:
    """The application's `args`, and the options of each deployment, out of serve.yaml."""
    application = yaml.safe_load(path.read_text())["applications"][0]
    options = {}
    for deployment in application["deployments"]:
        name = deployment.pop("name")
        options[name] = deployment
    return application["args"], options


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def serve(
    folder: Path, *, host: str, port: int, max_queue: int | None = None, **arguments: Any
) -> None:
    """Check every release of a folder, and serve them until SIGTERM or Ctrl-C.

    Requests that were accepted are answered before it ends.

    Args:
        port: 0 takes a free one.
        max_queue: requests that may wait for each of `stable` and `candidate`.
        arguments: of the application, instead of those in serve.yaml; None leaves them.

    Raises:
        LabError: Ray is missing, there is no release, one is refused, or the base can't be loaded.
    """
    if find_spec("ray") is None:
        raise LabError('the server needs Ray Serve: pip install "rlora-min[lab,serve]"')
    names = names_of(folder)
    if not names:
        raise LabError(f"{folder.name} holds no release, which is a folder with a {RELEASE}")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name):
            raise LabError(f"{name!r} can't be an adapter's name: letters, digits, _ and -")
    read_current(folder, names)
    args, options = read_config()
    args |= {name: value for name, value in arguments.items() if value is not None}
    args["folder"] = str(folder.absolute())
    for name in ("stable", "candidate"):
        options[name]["max_ongoing_requests"] = 2 * args["max_batch"]
        if max_queue is not None:
            options[name]["max_queued_requests"] = max_queue
    with tempfile.TemporaryDirectory(prefix="rlora-") as temporary:
        _run(args, options, names, host, port or free_port(), temporary)


def _run(args: dict, options: dict, names: list[str], host: str, port: int, temporary: str) -> None:
    import ray
    from ray import serve as ray_serve

    from .app import Settings, assemble

    metrics = free_port()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=MEMORY,
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=metrics,
        _temp_dir=temporary,
    )
    try:
        if ray.cluster_resources().get("GPU"):
            for name in ("stable", "candidate"):
                options[name]["ray_actor_options"]["num_gpus"] = 0.5
        ray_serve.start(http_options={"host": host, "port": port})
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # only now: ray.init sets its own
            signal.signal(number, lambda *_: stop.set())
        front = _deploy(assemble(Settings(**args), options))
        for name in names:
            why = front.check.remote(name).result()
            if why:
                raise LabError(why)
            print(f"{name}: checked and loaded", flush=True)
        print(f"metrics on http://127.0.0.1:{metrics}/metrics", flush=True)
        print(f"serving on http://{host}:{port}", flush=True)
        stop.wait()
        front.close.remote().result()
    finally:
        ray.shutdown()


def _deploy(application: Any) -> Any:
    """The handle of the front. LabError: a replica could not start, for a reason that it names."""
    from ray import serve as ray_serve

    try:
        return ray_serve.run(application, name="rlora", route_prefix="/")
    except RuntimeError as error:
        deployments = ray_serve.status().applications["rlora"].deployments.values()
        said = "\n".join(one.message for one in deployments)
        found = re.search(r"LabError: (.*)", said)
        raise LabError(found[1] if found else f"Ray Serve could not start: {error}") from error
