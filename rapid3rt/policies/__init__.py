# SPDX-License-Identifier: Apache-2.0
"""The policies: rules and files that decide, per image, whether to compute and how far to step."""

from rapid3rt.policies.budget import with_budget, with_speed
from rapid3rt.policies.controller import Controller
from rapid3rt.policies.fixed import Dense, Steps
from rapid3rt.policies.registry import is_rule, known_names, parse
from rapid3rt.policies.replay import Replay
from rapid3rt.policies.schedule import (
    FixedPlan,
    FixedSchedule,
    ScheduleFamily,
    ScheduleTick,
    WarpFamily,
    load_schedule,
    save_schedule,
    schedule_policy,
)
from rapid3rt.policies.threshold import Threshold

__all__ = [
    "Controller",
    "Dense",
    "FixedPlan",
    "FixedSchedule",
    "Replay",
    "ScheduleFamily",
    "ScheduleTick",
    "Steps",
    "Threshold",
    "WarpFamily",
    "is_rule",
    "known_names",
    "load_schedule",
    "parse",
    "save_schedule",
    "schedule_policy",
    "with_budget",
    "with_speed",
]
