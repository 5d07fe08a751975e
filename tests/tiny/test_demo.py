# SPDX-License-Identifier: Apache-2.0
"""What the demo settles before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rapid3rt.planning.trace import Trace, TraceTick
from rapid3rt.tiny import ASSETS, demo, load_tiny
from rapid3rt.types import COMPUTE


def test_a_policy_that_fixes_its_evaluations_gets_no_speed(tmp_path: Path) -> None:
    tick = TraceTick(sigma=1.0, next_sigma=0.0, action=COMPUTE)
    trace = Trace(model="tiny", family="sd3", ticks=1, sigmas=(1.0, 0.0), images=((tick,),))
    trace.save(tmp_path / "trace.json")
    for policy in ("steps:6", "steps:6/trim/ab2", f"replay:{tmp_path / 'trace.json'}"):
        assert demo._usual_speed(policy) is None


def test_every_other_policy_gets_the_speed_of_the_demo() -> None:
    folder = ASSETS / "sd3" / "policy"
    for policy in (
        "auto",
        "dense",
        "threshold:0.2",
        str(folder),
        f"schedule:{folder}/schedule.json",
    ):
        assert demo._usual_speed(policy) == demo.SPEED


def test_an_unknown_rival_is_refused_before_any_image_is_made() -> None:
    with pytest.raises(ValueError, match=r"rival must be one of DPM\+\+ 2M, UniPC, DEIS, got 'x'"):
        demo.run(None, "auto", None, "x")


def test_a_run_that_fails_says_why_and_leaves_the_pipeline_plain() -> None:
    pipe = load_tiny("sd3")
    plain = pipe.transformer
    with pytest.raises(ValueError, match=r"steps of policy 'steps:99' must be at most"):
        demo.run(pipe, "steps:99", None, "DPM++ 2M", rounds=1)
    assert pipe.transformer is plain
