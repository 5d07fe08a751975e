# SPDX-License-Identifier: Apache-2.0
"""Tables that line up, numbers that are the document's, gaps where nothing was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from studies import DIALS, hardness, measured, study

from training import adaptivity, panels
from training.comparison import Comparison, verdicts
from training.study import Study
from training.tables import markdown, table


def document(made: Study) -> dict[str, Any]:
    """As `evaluate` writes it."""
    comparison = Comparison(made, draws=60)
    parts: dict[str, Any] = {
        "settings": {
            "model": "tiny-sd3",
            "dtype": "float32",
            "pairs": len(made.scenes),
            "others": 20,
            "calibration": 8,
            "split": "test",
            "reference": 120,
            "dials": list(made.dials),
        },
        "policies": [{"name": "mine", "digest": "0"}],
        "calibration": {
            "solver": "DPM++ 2M",
            "errors": {"DPM++ 2M": 0.001, "UniPC": 0.002},
            "tolerances": {str(k): [1 / k, k + 0.1] for k in made.dials},
            "thresholds": {str(k): [2 / k, k - 0.1] for k in made.dials},
            "peers": {},
        },
        "ways": comparison.ways(),
        "against": comparison.against(),
        "iso": comparison.iso(),
        **adaptivity.everything(comparison),
    }
    return parts | {"verdicts": verdicts(parts, made.dials)}


def with_gaps() -> Study:
    """Nobody shuffled, a rival at one dial only and too dear, a policy that reuses."""
    base = study()
    rivals = {**base.rivals, "odd": {6.0: measured(hardness(), 27.0)}}
    ours = {k: replace(way, dense=False) for k, way in base.ours.items()}
    return replace(base, rivals=rivals, ours=ours)


def test_columns_line_up() -> None:
    lines = table(["way", "m"], [["plain", "12.5"], ["ours", "-"]]).splitlines()
    assert lines == ["| way   |    m |", "| ----- | ---: |", "| plain | 12.5 |", "| ours  |    - |"]


def test_the_page_says_what_the_document_says() -> None:
    made = document(study(shuffled={6.0: measured(hardness() / 20, 6.0)}))
    page = markdown(made)
    answer = made["against"]["plain"]["6"]["difference"]
    assert f"{100 * answer['value']:+.0f} % ({100 * answer['low']:+.0f}" in page
    cost = made["iso"]["ours"]["cost"]["value"]
    assert f"plain full run at {cost:.1f} equivalent steps" in page
    full = made["ways"]["full"]["error"]["value"]
    assert f"Plain full run: {1000 * full:.2f} (" in page
    for title in ("Error at every dial", "Adaptivity", "Iso-accuracy", "Quality", "Within strata"):
        assert f"## {title}" in page
    assert all(f"dial {k}" in page for k in DIALS)
    assert "nan" not in page
    assert "None" not in page


def test_the_settings_of_other_caches_are_shown() -> None:
    made = document(study())
    assert "warm-up" not in markdown(made)
    setting = {"steps": 20, "warm_up": 5, "reach": 0.4}
    tuned = {"setting": setting, "cost": 7.891, "error": 0.1}
    made["calibration"]["peers"] = {"cache-dit": {"8": tuned}}
    assert "| cache-dit |    8 |    20 |       5 |   0.4 | 7.89 |" in markdown(made)


def test_gaps_stay_empty() -> None:
    page = markdown(document(with_gaps()))
    (row,) = (
        line
        for line in page.splitlines()
        if line.startswith("| odd") and "%" not in line and ":" not in line
    )
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["odd", "-", "-", "-"]
    assert "None" not in page


def test_an_accuracy_out_of_reach_is_no_speed_up() -> None:
    base = study()
    page = markdown(document(replace(base, full=measured(hardness() / 1e6, 28.0))))
    assert "is not reached within the means" in page
    assert "above" in page


@pytest.mark.slow
@pytest.mark.parametrize("made", [study(), with_gaps()], ids=["whole", "gaps"])
def test_every_picture_is_drawn(made: Study, tmp_path: Any) -> None:
    files = panels.draw_all(document(made), tmp_path / "new")
    assert {file.stem for file in files} == {"error", "against", "adaptivity", "strata"}
    for file in files:
        with Image.open(file) as picture:
            extrema = picture.convert("L").getextrema()
        assert extrema[0] < 100  # there is ink


@pytest.mark.slow
def test_strata_of_too_few_pairs_are_not_drawn(tmp_path: Any) -> None:
    made = document(study())
    for stratum in made["strata"]:
        stratum.pop("curves", None)
    assert "strata" not in {file.stem for file in panels.draw_all(made, tmp_path)}


def test_the_grid_shows_the_pixels_it_was_given(tmp_path: Any) -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
    example = panels.Example(caption="a " * 300, images=(red, -red), notes=("", "note"))
    panels.draw_grid([example] * 3, ("left", "right"), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        colours = {colour for _, colour in picture.getcolors(1 << 16)}
        assert {(255, 0, 0), (0, 255, 255)} <= colours
