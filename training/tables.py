# SPDX-License-Identifier: Apache-2.0
"""The tables of an evaluation: Markdown whose columns line up, so that the screen shows the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.adaptivity import FEWEST_PAIRS
from training.comparison import OURS

Json = Mapping[str, Any]
_NOTHING = "-"
_SEEDS = ", t distribution over training seeds (of one bank where they share it)"


def markdown(document: Json, pictures: Iterable[str] = ()) -> str:
    """The whole page. document: what `evaluate.json` holds. pictures: files to show at its end."""
    settings = document["settings"]
    names = ", ".join(policy["name"] for policy in document["policies"])
    seeds = len(document["policies"])
    head = [
        f"# {names} on {settings['model']} in {settings['dtype']}",
        f"{settings['pairs']} pairs of the {settings['split']} split ({settings['others']} for some rivals), "
        f"{seeds} training seed{'s' * (seeds > 1)}. Error m: mean squared difference to the converged solution "
        f"({settings['reference']} steps), pixels in -1..1, in 1e-3. Cost: equivalent steps, mean over images. "
        f"Intervals: 95 %, bootstrap over prompts and noises{_SEEDS if seeds > 1 else ''}. Dials: {_dials(document)}.",
    ]
    sections = [
        _headline(document),
        _errors(document),
        _against(document),
        _adaptivity(document),
        _iso(document),
        _quality(document),
        _strata(document),
        _rivals(document),
        *(f"![{name.partition('.')[0]}]({name})" for name in pictures),
    ]
    return "\n\n".join([*head, *sections]) + "\n"


def _headline(document: Json) -> str:
    iso = document["iso"].get(OURS)
    if iso is None or iso["cost"]["value"] is None:
        return "**The accuracy of the plain full run is not reached within the means that were asked for.**"
    speedup = iso["speedup"]
    low, high = (_number(speedup[end], 2) for end in ("low", "high"))
    cost = _number(iso["cost"]["value"], 1)
    return f"**Accuracy of the plain full run at {cost} equivalent steps: {speedup['value']:.2f}x ({low} .. {high}).**"


def _errors(document: Json) -> str:
    dials = document["settings"]["dials"]
    rows = []
    for name, curve in document["ways"].items():
        if name == "full" or not any(f"{k:g}" in curve for k in dials):
            continue
        points = [curve.get(f"{k:g}") for k in dials]
        pairs = next(p["pairs"] for p in points if p)
        rows.append([name, str(pairs), *(_point(point) for point in points)])
    full = document["ways"]["full"]
    title = f"## Error at every dial\n\nPlain full run: {_thousandths(full['error'])}. Each cell: cost: error."
    return title + "\n\n" + table(["way", "pairs", *(f"dial {k}" for k in dials)], rows)


def _point(point: Json | None) -> str:
    if point is None:
        return _NOTHING
    return f"{point['cost']['value']:.2f}: {_thousandths(point['error'])}"


def _against(document: Json) -> str:
    dials = document["settings"]["dials"]
    rows = [
        [name, *(_difference(by_dial.get(f"{k:g}")) for k in dials)]
        for name, by_dial in document["against"].items()
    ]
    text = (
        "## Ours against each, at equal cost\n\nRelative difference of the mean error; * holds after Holm's "
        "correction over dials. Empty: one of the two was not measured at that cost."
    )
    return text + "\n\n" + table(["rival", *(f"dial {k}" for k in dials)], rows)


def _difference(answer: Json | None) -> str:
    if not answer or "difference" not in answer:
        return _NOTHING
    star = " *" if answer.get("better") or answer.get("worse") else ""
    return _percent(answer["difference"]) + star


def _adaptivity(document: Json) -> str:
    rows = []
    for dial, verdict in document["verdicts"].items():
        room, control = document["head_room"][dial], document["shuffled"].get(dial)
        lookup = document["shuffled_allocation"].get(dial)
        rows.append(
            [
                dial,
                _percent(room["head_room"]),
                _percent(room["share"]) if room["share"] else _NOTHING,
                _percent(control["relative_gain"]) if control else _NOTHING,
                _percent(lookup["relative_gain"]) if lookup else _NOTHING,
                _ratio(document["difficulty"]["dials"][dial]["hardest_over_easiest"]),
                _yes(verdict["better_than_plain"]),
                _yes(verdict["better_than_searched"]),
                _yes(verdict["adaptive"]),
            ]
        )
    titles = ["dial", "head-room", "share of it", "gain over shuffled", "of the allocation alone"]
    titles += ["cost hard / easy third", "beats plain", "beats searched", "adaptive"]
    text = (
        "## Adaptivity\n\nHead-room: what an oracle over the searched family would save at the same cost; a share is "
        "given where its lower bound exceeds 5 %. Gain: of the own plan over another image's. Adaptive: better than "
        "the searched family *and* than shuffled."
    )
    return text + "\n\n" + table(titles, rows)


def _iso(document: Json) -> str:
    rows = []
    for name, answer in document["iso"].items():
        cost, speedup = answer["cost"], answer["speedup"]
        reached = cost["value"] is not None
        beyond = f"above {answer['measured_to']:.1f}"
        rows.append(
            [name, _ratio(cost, 1) if reached else beyond, _ratio(speedup) if reached else _NOTHING]
        )
    text = (
        "## Iso-accuracy\n\nCost at which a way has the error of the plain full run. Redraws that do not come down to "
        "it within the costs that were measured leave an end of the interval open: no cost, a speed-up of 0."
    )
    return text + "\n\n" + table(["way", "cost", "speed-up"], rows)


def _quality(document: Json) -> str:
    rows = [["plain 28", _NOTHING, *_qualities(document["ways"]["full"])]]
    for dial in (f"{k:g}" for k in document["settings"]["dials"]):
        for name in ("plain", OURS):
            rows.append([name, dial, *_qualities(document["ways"][name][dial])])
    titles = ["way", "dial", "cost", "worst tenth", "scene score", "drop", "PSNR dB", "SSIM"]
    text = "## Quality\n\nPSNR and SSIM to the plain full run; drop: of the scene score from it, at most 0.01 wanted."
    return text + "\n\n" + table(titles, rows)


def _qualities(point: Json) -> list[str]:
    drop, full = point["score_drop"], point["psnr"]["value"] > 120
    return [
        f"{point['cost']['value']:.2f}",
        _thousandths(point["worst_tenth"]),
        f"{point['score']['value']:.3f}",
        _NOTHING if full else f"{drop['value']:+.4f} ({drop['low']:+.4f} .. {drop['high']:+.4f})",
        _NOTHING if full else f"{point['psnr']['value']:.1f}",
        _NOTHING if full else f"{point['ssim']['value']:.4f}",
    ]


def _strata(document: Json) -> str:
    dials = document["settings"]["dials"]
    rows = [
        [
            stratum["by"],
            stratum["name"],
            str(stratum["pairs"]),
            *(_within(stratum.get("dials", {}).get(f"{k:g}")) for k in dials),
        ]
        for stratum in document["strata"]
    ]
    text = (
        "## Within strata\n\nOurs against the searched family at the cost that ours has there; each cell: cost: "
        f"relative difference of the mean error. {_NOTHING}: fewer than {FEWEST_PAIRS} pairs."
    )
    return text + "\n\n" + table(["by", "stratum", "pairs", *(f"dial {k}" for k in dials)], rows)


def _within(answer: Json | None) -> str:
    if not answer:
        return _NOTHING
    difference = _percent(answer["difference"]) if "difference" in answer else "not measured"
    return f"{answer['cost']:.2f}: {difference}"


def _rivals(document: Json) -> str:
    found = document["calibration"]
    rows = [
        [
            f"{k}",
            *(f"{setting:.4g}: {cost:.2f}" for setting, cost in (found[r][str(k)] for r in _RULES)),
        ]
        for k in document["settings"]["dials"]
    ]
    solvers = ", ".join(f"{name} {1000 * m:.2f}" for name, m in sorted(found["errors"].items()))
    text = (
        f"## How the rivals were set\n\nOn {document['settings']['calibration']} pairs of the validation split. Best "
        f"multistep solver: {found['solver']} (geometric mean error over dials: {solvers}). Each cell: setting: cost."
    )
    settings = table(["dial", "controller", "threshold"], rows)
    return "\n\n".join([text, settings, *_peers(found["peers"])])


def _peers(found: Json) -> list[str]:
    """How the caches of others were set, where there are any."""
    if not found:
        return []
    rows = [
        [name, dial, *map(str, tuned["setting"].values()), f"{tuned['cost']:.2f}"]
        for name, by_dial in found.items()
        for dial, tuned in by_dial.items()
    ]
    text = (
        "Caches of others, every image in a call of its own: for each dial the setting of least error that costs no "
        "more on the same validation pairs. Reach: threshold, or interval."
    )
    return [text, table(["cache", "dial", "steps", "warm-up", "reach", "cost"], rows)]


_RULES = ("tolerances", "thresholds")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns of even width; all but the first are set to the right."""
    lines = [list(titles), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def _dials(document: Json) -> str:
    return ", ".join(str(k) for k in document["settings"]["dials"])


def _thousandths(span: Json) -> str:
    value, low, high = (_number(_times(span[end], 1000), 2) for end in ("value", "low", "high"))
    return f"{value} ({low} .. {high})"


def _percent(span: Json) -> str:
    value, low, high = (
        _NOTHING if span[end] is None else f"{100 * span[end]:+.0f}"
        for end in ("value", "low", "high")
    )
    return f"{value} % ({low} .. {high})"


def _ratio(span: Json, digits: int = 2) -> str:
    value, low, high = (_number(span[end], digits) for end in ("value", "low", "high"))
    return f"{value} ({low} .. {high})"


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _yes(answer: bool | None) -> str:
    return _NOTHING if answer is None else "yes" if answer else "no"
