# SPDX-License-Identifier: Apache-2.0
"""Train policy heads through the runtime that serves them. Runs from a checkout: `python -m training.run RECIPE`."""
