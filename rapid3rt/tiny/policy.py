# SPDX-License-Identifier: Apache-2.0
"""Calibrate a bundled pipeline as its bundled policy was: `python -m rapid3rt.tiny.policy sd3 --out DIR`.

Half an hour on two cores; the same folder again goes on after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rapid3rt.calibrate import calibrate, format_table
from rapid3rt.tiny import GUIDANCE, load_tiny
from rapid3rt.tiny.scenes import sample

NUM_PROMPTS = 128
SEED = 3
CALL = {"guidance_scale": GUIDANCE, "max_sequence_length": 32}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Calibrate a bundled tiny pipeline.")
    parser.add_argument("model", help="sd3 or flux")
    parser.add_argument("--out", type=Path, required=True, help="policy folder; resumes")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="of the calibration split")
    options = parser.parse_args(arguments)
    prompts = [scene.caption for scene in sample(options.prompts, SEED, "calibration")]
    folder = calibrate(load_tiny(options.model), prompts, options.out, batch_size=16, call=CALL)
    print(format_table(folder.provenance["mean_squared_error"]))


if __name__ == "__main__":
    main()
