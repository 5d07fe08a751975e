# SPDX-License-Identifier: Apache-2.0
"""Where the kernel refuses tile registers, as old ones and sandboxes do, attention runs on AVX-512 instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# arch_prctl(ARCH_REQ_XCOMP_PERM) fails with EPERM, by a seccomp filter; everything else is allowed.
REFUSED = """
import ctypes, struct, sys

def step(code, true, false, value):
    return struct.pack("HBBI", code, true, false, value)

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
SYSCALL, ARGUMENT = 0, 16
program = b"".join([
    step(LOAD, 0, 0, SYSCALL),
    step(EQUAL, 0, 3, 158),
    step(LOAD, 0, 0, ARGUMENT),
    step(EQUAL, 0, 1, 0x1023),
    step(RETURN, 0, 0, 0x00050000 | 1),
    step(RETURN, 0, 0, 0x7FFF0000),
])
code = ctypes.create_string_buffer(program)

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

libc = ctypes.CDLL(None, use_errno=True)
filter = Program(len(program) // 8, ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.byref(filter), 0, 0) != 0:  # PR_SET_SECCOMP, a filter
    print("no seccomp")
    sys.exit()
assert libc.syscall(158, 0x1023, 18) == -1
"""

ATTEND = """
import torch
from rapid3rt import _cpu, ops

print(_cpu.isa())
q, k, v = (torch.randn(1, 2, 130, 64, dtype=torch.bfloat16) for _ in range(3))
mode = torch.zeros(1, 2, dtype=torch.uint8)
out, _ = ops.block_sparse_attention(q, k, v, mode, None, None, None, None, 64, 64, 0.125, False)
truth = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
print(float((out.double() - truth).abs().max()) < 0.02)
"""


def has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and {"amx_tile", "amx_bf16"} <= set(info.read_text().split())


@pytest.mark.slow
@pytest.mark.skipif(not has_amx(), reason="no AMX to be refused")
@pytest.mark.parametrize("refused", [True, False])
def test_attention_does_without_tiles_where_they_are_refused(refused: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", (REFUSED if refused else "") + ATTEND],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.split()
    if told == ["no", "seccomp"]:
        pytest.skip("this kernel has no seccomp")
    assert told == ["avx512_bf16" if refused else "amx", "True"]
