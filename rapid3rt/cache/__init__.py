# SPDX-License-Identifier: Apache-2.0
"""What survives from one tick to the next: residuals of the block stack, per image and guidance branch."""

from rapid3rt.cache.residual import ResidualCache

__all__ = ["ResidualCache"]
