"""Names that plans and reports share with what trains: this module imports nothing of the lab."""

from importlib.resources import files
from pathlib import Path

UNTRAINED = "none"
METHODS = (
    UNTRAINED,
    "heads",
    "lora",
    "lora-classic",
    "lora-rank",
    "lora-rank+init",
    "hydralora",
    "hydralora-classic",
    "hydralora-own",
    "hydralora+dropout",
    "hydralora+init",
    "one-head",
    "mlora",
    "mlora-nodropout",
    "oracle",
    "rlora-centered",
    "rlora+router",
    "rlora-moved",
    "rlora",
)
"""What each is: `rlora_lab.models.methods`."""

LAB = Path(str(files("rlora_lab")))
"""This package's folder: plans, records and data are in it."""

SUITES = {
    "synthetic": (4e-3, 64),
    "sentences": (1e-3, 36),
    "language": (1e-3, 32),
    "files": (1e-3, 32),
}
"""Their usual learning rate and batch. What each asks: `rlora_lab.tasks`."""

AUGMENTATIONS = ("as they are", "rename", "shuffle")
FRESH = "a fresh adapter"
"""How a scarce task can be learned alone: `rlora_lab.runs.scarce`."""
