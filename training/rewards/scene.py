# SPDX-License-Identifier: Apache-2.0
"""The exact score of the tiny world as a reward: which objects, colours, places and ground of the caption are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rapid3rt.tiny.scenes import Scene
from rapid3rt.tiny.score import score
from training.rewards.base import Samples, score_members


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneReward:
    """Score of a picture against its scene, 0..1 (`rapid3rt.tiny.score`).

    continuous: an object counts by colour share and shape overlap instead of right or wrong: the form to train on,
    since members of a group then seldom tie.
    """

    continuous: bool = False

    @property
    def name(self) -> str:
        """`scene`, or `scene_continuous`."""
        return "scene_continuous" if self.continuous else "scene"

    def __call__(self, samples: Samples) -> torch.Tensor:
        """Raises `ValueError` where the samples have no scenes or are not of 64 x 64 pixels."""
        scenes = samples.scenes
        if scenes is None:
            raise ValueError(f"scenes must be given for the reward '{self.name}', got None")
        return score_members(samples.finite, lambda m: self._score(samples, scenes, m))

    def _score(self, samples: Samples, scenes: Sequence[Scene], members: list[int]) -> torch.Tensor:
        shown = [scenes[i] for i in members]
        return torch.from_numpy(score(samples.images[members], shown, continuous=self.continuous))
