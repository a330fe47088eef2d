"""The Ray Serve application that `serve.yaml` names."""

from typing import Any

from ray.serve import Application

from .adapters import Adapters, Settings
from .front import Front

Options = dict[str, dict[str, Any]]


def assemble(settings: Settings, options: Options) -> Application:
    """The front and, behind it, the adapters in service and those that are tried.

    Args:
        options: of the deployments `front`, `stable` and `candidate`, as in serve.yaml.
    """
    stable = Adapters.options(name="stable", **options.get("stable", {}))
    candidate = Adapters.options(name="candidate", **options.get("candidate", {}))
    front = Front.options(**options.get("front", {}))
    return front.bind(
        settings.folder, settings.timeout, stable.bind(settings), candidate.bind(settings)
    )


def build(settings: Settings) -> Application:
    """For `serve deploy`, which sets the options by itself."""
    return assemble(settings, {})
