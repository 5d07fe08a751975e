# SPDX-License-Identifier: Apache-2.0
"""The discriminator: a frozen encoder and a small trained head that knows full pictures from accelerated ones.

Why it is there (METHOD.md, section 3): a score of pictures alone rises as steps are taken away. The part of the reward
that comes from here falls when pictures stop looking like the frozen generator's own.
"""

from __future__ import annotations

from training.discriminator.config import DiscriminatorConfig
from training.discriminator.discriminator import Discriminator
from training.discriminator.features import Features, clip_features, vae_features

__all__ = ["Discriminator", "DiscriminatorConfig", "Features", "clip_features", "vae_features"]
