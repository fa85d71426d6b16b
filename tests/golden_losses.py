"""The loss curve of recipes/debug.yaml, kept in golden_losses.json.

The same mathematics gives the same losses. Where a change of it is meant, run the recipe and this
file, and say in the commit why the curve moved:

    colada train recipes/debug.yaml --out runs/debug && python tests/golden_losses.py runs/debug
"""

import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).with_suffix(".json")


def curve(metrics: Path) -> dict[str, list[float]]:
    """Return the training loss of each stage at the steps that were logged."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        stage: [r["loss"] for r in records if (r["stage"], r["split"]) == (stage, "train")]
        for stage in ("vae", "prior")
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(curve(Path(sys.argv[1]) / "metrics.jsonl"), indent=1) + "\n")
