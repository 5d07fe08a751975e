# SPDX-License-Identifier: Apache-2.0
"""What the package knows of proven GPUs: exact capability, exact dtype, and a file that nobody wrote by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rapid3rt.ops import proven

RECORD = {
    "capability": [8, 6],
    "dtypes": ["bfloat16", "float32"],
    "device": "NVIDIA GeForce RTX 3090",
    "driver": "580.95.05",
    "torch": "2.11.0+cu130",
    "commit": "0123abc",
}


@pytest.fixture
def one_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "proven.json"
    path.write_text(json.dumps({"format": 1, "records": [RECORD]}))
    monkeypatch.setattr(proven, "PATH", path)
    proven.proofs.cache_clear()
    yield
    proven.proofs.cache_clear()


@pytest.mark.usefixtures("one_proof")
def test_a_proof_holds_for_its_capability_and_its_dtypes_alone() -> None:
    assert proven.is_proven((8, 6), torch.bfloat16)
    assert proven.is_proven((8, 6), torch.float32)
    assert not proven.is_proven((8, 6), torch.float16)
    assert not proven.is_proven((8, 0), torch.bfloat16)
    assert not proven.is_proven((9, 0), torch.bfloat16)


def test_the_file_in_the_package_can_be_read() -> None:
    proven.proofs.cache_clear()
    for proof in proven.proofs():
        assert proof.commit
        for name in proof.dtypes:
            assert proven.is_proven(proof.capability, getattr(torch, name))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        ('{"format": 2, "records": []}', "format 2 instead of 1"),
        ('{"format": 1, "records": [{"capability": [8, 6]}]}', "no 'dtypes'"),
        (
            json.dumps({"format": 1, "records": [{**RECORD, "capability": [8]}]}),
            "not enough values",
        ),
    ],
)
def test_another_file_is_refused(value: str, what: str) -> None:
    with pytest.raises(ValueError, match=rf"proven.json must be .*: .*{what}"):
        proven.parse(value)
