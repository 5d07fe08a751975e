# SPDX-License-Identifier: Apache-2.0
"""`python -m training.run` in the small world: the same program with another pipeline, for tests that kill it."""

from __future__ import annotations

from typing import Any

import small_world

import training.subject
from training.run import main


def load_pipeline(*_: Any) -> Any:
    """The small one, whatever the recipe says, wherever it is wanted."""
    return small_world.make_pipe()


if __name__ == "__main__":
    training.subject.load_pipeline = load_pipeline
    main()
