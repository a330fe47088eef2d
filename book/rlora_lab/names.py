"""Names that plans and reports share with what trains: this module imports nothing."""

METHODS = (
    "lora",
    "lora-classic",
    "lora-rank",
    "hydralora",
    "hydralora-own",
    "hydralora+dropout",
    "hydralora+init",
    "one-head",
    "mlora",
    "mlora-nodropout",
    "rlora-centered",
    "rlora",
)
"""What each is: `rlora_lab.models.methods`."""

SUITES = {"synthetic": (4e-3, 64), "sentences": (1e-3, 36)}
"""Their usual learning rate and batch. What each asks: `rlora_lab.tasks`."""

AUGMENTATIONS = ("as they are", "rename", "shuffle")
FRESH = "a fresh adapter"
"""How a scarce task can be learned alone: `rlora_lab.runs.scarce`."""
