# SPDX-License-Identifier: Apache-2.0
"""Policy folders: what is written is read, and whatever else lies there is one error that names file and field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rapid3rt.policies.folder import PATTERNS, PolicyFolder
from rapid3rt.policies.heads import count_parameters
from rapid3rt.policies.learned import Dial, Heads, HeadsConfig
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.types import AUTO, EULER, ActionCosts

FAMILY = WarpFamily(family="sd3", num_ticks=28, shift=3.0, order=AUTO, knots=((0.3, 0.2),))
COSTS = ActionCosts(levels=(1.01, 0.9), reuse=0.05, measured=True)
DIALS = (
    Dial(dial=5, equivalent_steps=5.5, evaluations=5.4, error=4e-3),
    Dial(dial=8, equivalent_steps=8.25, evaluations=8.1, error=2e-3),
)
CONFIG = HeadsConfig(
    family="sd3",
    channels=4,
    conditioning=8,
    heads=("cache", "sparse", "allocation", "step"),
    levels=2,
    width=8,
    side=4,
    dials=(5.0, 8.0),
    silent=(8.0,),
)


def make(config: HeadsConfig = CONFIG) -> PolicyFolder:
    torch.manual_seed(0)
    heads = Heads(config)
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    return PolicyFolder(
        model="SD3-x",
        schedule=FAMILY if config.has_prior else None,
        costs=COSTS,
        provenance={"seed": 3},
        heads=heads,
        order=EULER,
        calibration=DIALS,
        latent_grid=(16, 12),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save(tmp_path)
    return tmp_path


def same_heads(a: Heads, b: Heads) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_is_written_is_read(saved: Path) -> None:
    written, read = make(), PolicyFolder.load(saved)
    assert same_heads(written.heads, read.heads)
    assert read.heads.config == CONFIG
    assert (read.schedule, read.costs, read.model, read.order) == (FAMILY, COSTS, "SD3-x", EULER)
    assert (read.calibration, read.latent_grid) == (DIALS, (16, 12))
    assert read.provenance == {"seed": 3}
    assert read.family == "sd3"
    assert not any(p.requires_grad for p in read.heads.parameters())
    assert {path.name for path in saved.iterdir()} == {
        "config.json",
        "schedule.json",
        "heads.safetensors",
    }


def test_heads_without_a_prior_have_no_schedule(tmp_path: Path) -> None:
    config = replace(CONFIG, heads=("cache", "sparse", "step"), has_prior=False, silent=())
    make(config).save(tmp_path)
    assert not (tmp_path / "schedule.json").exists()
    assert PolicyFolder.load(tmp_path).schedule is None


def test_saving_anew_replaces_what_was_there(saved: Path) -> None:
    PolicyFolder(model="SD3-y", schedule=FAMILY, costs=COSTS, provenance={}).save(saved)
    read = PolicyFolder.load(saved)
    assert (read.heads, read.model) == (None, "SD3-y")


def test_a_level_without_a_cost_is_refused(tmp_path: Path) -> None:
    make(replace(CONFIG, levels=3)).save(tmp_path)
    with pytest.raises(ValueError, match=r"learned\.heads\.levels must be at most the 2 that have"):
        PolicyFolder.load(tmp_path)


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    before = torch.get_rng_state()
    PolicyFolder.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_file_is_named(saved: Path) -> None:
    for name in ("heads.safetensors", "schedule.json"):
        path = saved / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=f"must hold a {name}, got none"):
            PolicyFolder.load(saved)
        path.write_bytes(content)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"must be a folder with a config\.json"):
        PolicyFolder.load(saved)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_damaged_weights_are_named(saved: Path, damage: str) -> None:
    path = saved / "heads.safetensors"
    content = path.read_bytes()
    wrong = {"cut": content[:-7], "empty": b"", "text": b"not weights", "pickle": b"\x80\x04K\x01."}
    path.write_bytes(wrong[damage])
    with pytest.raises(ValueError, match=r"heads\.safetensors: content must be the weights"):
        PolicyFolder.load(saved)


def test_weights_of_other_heads_are_named_by_what_is_wrong(saved: Path) -> None:
    path = saved / "heads.safetensors"
    whole = load_file(path)
    some = {name: x for name, x in whole.items() if name != "by_name.step.decide.bias"}
    further = whole | {"by_name.step.more": torch.zeros(1)}
    larger = whole | {"by_name.step.decide.bias": torch.zeros(3)}
    for weights, name in (
        (some, "step.decide.bias"),
        (further, "step.more"),
        (larger, "step.decide.bias"),
    ):
        save_file(weights, path)
        with pytest.raises(
            ValueError, match=rf"heads\.safetensors: by_name\.{name} must be "
        ) as error:
            PolicyFolder.load(saved)
        assert "\n" not in str(error.value)


def test_heads_of_before_there_was_silence_speak(saved: Path) -> None:
    path = saved / "config.json"
    document = json.loads(path.read_text())
    del document["learned"]["heads"]["silent"]
    path.write_text(json.dumps(document))
    assert PolicyFolder.load(saved).heads.config.silent == ()


def test_weights_of_another_save_are_refused(saved: Path) -> None:
    """As a crash may leave them beside the config of before."""
    weights = load_file(saved / "heads.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, saved / "heads.safetensors")
    with pytest.raises(ValueError, match=r"learned\.weights must be the digest of heads\.safetens"):
        PolicyFolder.load(saved)


def test_a_folder_that_cannot_be_written_stays_as_it_is(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    folder = PolicyFolder.load(saved)
    folder.provenance["error"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_fields_that_nothing_reads_are_named(saved: Path) -> None:
    path = saved / "config.json"
    document = json.loads(path.read_text())
    heads = document["learned"]["heads"]
    heads["slient"] = heads.pop("silent")
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"learned\.heads\.slient must be one of .*silent"):
        PolicyFolder.load(saved)


def test_weights_that_are_no_numbers_are_named(saved: Path) -> None:
    path = saved / "heads.safetensors"
    weights = load_file(path)
    weights["by_name.cache.reduce.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path)
    with pytest.raises(
        ValueError, match=r"heads\.safetensors: by_name\.cache\.reduce\.weight must be finite"
    ):
        PolicyFolder.load(saved)


GONE = object()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("learned", GONE, "learned must be present"),
        ("kind", "foreign", "kind must be one of schedule, learned"),
        ("version", 2, "version must be 1"),
        ("levels", [], "levels must hold at least the dense cost"),
        ("model", 3, "model must be a string"),
        ("learned.heads", [1], r"learned\.heads must be an object"),
        ("learned.heads.family", None, r"learned\.heads\.family must be a string"),
        ("learned.heads.family", "flux", r"learned\.heads\.family must be that of schedule\.json"),
        ("learned.heads.channels", "4", r"learned\.heads\.channels must be an integer"),
        ("learned.heads.channels", 5, r"project\.weight"),
        ("learned.heads.conditioning", 0, r"learned\.heads\.conditioning must be an integer"),
        ("learned.heads.heads", ["stepp"], r"learned\.heads: heads must be some of"),
        ("learned.heads.heads", [{}], r"learned\.heads: heads must be some of"),
        ("learned.heads.heads", "step", r"learned\.heads\.heads must be a list"),
        ("learned.heads.levels", 3, r"by_name\.sparse\.decide\.bias must be of shape \(3,\)"),
        ("learned.heads.width", 16, r"by_name\.cache\.decide\.weight must be of shape"),
        ("learned.heads.side", 0, r"learned\.heads\.side must be an integer"),
        ("learned.heads.has_prior", "yes", r"learned\.heads\.has_prior must be true or false"),
        ("learned.heads.has_prior", False, r"learned\.heads: heads must not hold 'allocation'"),
        ("learned.heads.dials", [5, 5], r"learned\.heads: dials must be at least two"),
        ("learned.heads.dials", [5, 8, 9], r"by_name\.allocation\.\w+"),
        ("learned.heads.silent", [6], r"learned\.heads: silent must be some of the dials"),
        ("learned.heads.silent", 8, r"learned\.heads\.silent must be a list"),
        ("learned.order", 7, r"learned\.order must be an integer"),
        ("learned.calibration", {}, r"learned\.calibration must be a list"),
        ("learned.calibration", [{"dial": 5}], r"learned\.calibration\[0\]\.equivalent_steps must"),
        ("learned.latent_grid", [1], r"learned\.latent_grid must be null or two"),
        ("learned.latent_grid", "x", r"learned\.latent_grid must be a list"),
    ],
)
def test_a_wrong_field_is_named(saved: Path, where: str, value: object, message: str) -> None:
    path = saved / "config.json"
    document = json.loads(path.read_text())
    *parents, name = where.split(".")
    inner = document
    for parent in parents:
        inner = inner[parent]
    if value is GONE:
        del inner[name]
    else:
        inner[name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        PolicyFolder.load(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_calibration_must_rise(saved: Path) -> None:
    path = saved / "config.json"
    document = json.loads(path.read_text())
    document["learned"]["calibration"].reverse()
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"learned\.calibration must rise in dial"):
        PolicyFolder.load(saved)


def test_a_folder_travels_over_the_hub(saved: Path, tmp_path: Path, monkeypatch) -> None:
    """save_pretrained, push_to_hub and from_pretrained, the hub being a folder here."""
    hub = tmp_path / "hub"
    pushed = {}

    class Api:
        def __init__(self, **options: object) -> None:
            pass

        def create_repo(self, repo_id: str, **options: object):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: object) -> str:
            Path(folder_path).rename(hub)
            Path(folder_path).mkdir()
            pushed["to"] = repo_id
            return "done"

    def download(repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        assert repo_id == "org/policy"
        assert allow_patterns == list(PATTERNS)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download",
        lambda **options: str(hub / options["filename"]),
    )
    monkeypatch.setattr("rapid3rt.policies.folder.snapshot_download", download)
    folder = PolicyFolder.load(saved)
    folder.save_pretrained(tmp_path / "kept")
    assert same_heads(PolicyFolder.from_pretrained(tmp_path / "kept").heads, folder.heads)
    folder.push_to_hub("org/policy")
    assert pushed == {"to": "org/policy"}
    loaded = PolicyFolder.from_pretrained("org/policy")
    assert same_heads(loaded.heads, folder.heads)
    assert (loaded.calibration, loaded.model, loaded.schedule) == (DIALS, "SD3-x", FAMILY)
    card = (hub / "README.md").read_text()
    assert "rapid3rt.accelerate(pipe, policy=" in card
    assert "diffusion" in card


def test_three_heads_on_flux_have_the_papers_size(capsys) -> None:
    config = HeadsConfig(
        family="flux",
        channels=64,
        conditioning=3072,
        heads=("cache", "sparse", "step"),
        width=128,
        has_prior=False,
    )
    with torch.device("meta"):
        number = count_parameters(Heads(config))
    with capsys.disabled():
        print(f"\nthree heads on FLUX: {number:,} parameters")
    assert 2.9e6 < number < 3.3e6
