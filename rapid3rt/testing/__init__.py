# SPDX-License-Identifier: Apache-2.0
"""Cases, error rules and timing that the tests and the benches share. Not part of the runtime."""
