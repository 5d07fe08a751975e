# SPDX-License-Identifier: Apache-2.0
"""The rules on the bundled pipelines, as a user meets them: real weights and real prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rapid3rt
from rapid3rt.tiny.scenes import sample

PROMPTS = [s.caption for s in sample(3, 21)]


@pytest.fixture(scope="module", params=["sd3", "flux"])
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = rapid3rt.load_tiny(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: Any, steps: int, prompts: list[str] = PROMPTS, first: int = 0, **kwargs: Any
) -> torch.Tensor:
    """Latents of some prompts, each with its own noise."""
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
    arguments = {"max_sequence_length": 32, "output_type": "latent", **kwargs}
    images: torch.Tensor = pipe(
        prompts, num_inference_steps=steps, generator=generators, **arguments
    ).images
    return images


@pytest.fixture(autouse=True)
def _plain_again(pipe: Any) -> Any:
    yield
    if type(pipe.transformer).__mro__[1].__name__ == type(pipe.transformer).__name__:
        rapid3rt.restore(pipe)


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_dense_is_the_plain_pipeline_bit_for_bit(pipe: Any, guidance: float) -> None:
    plain = call(pipe, 3, guidance_scale=guidance)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, 3, guidance_scale=guidance))


@pytest.mark.slow
def test_dense_keeps_skip_layer_guidance_and_a_policy_that_leaves_the_grid_is_refused(
    pipe: Any,
) -> None:
    if not hasattr(pipe, "do_classifier_free_guidance"):
        pytest.skip("FLUX has no skip-layer guidance")
    window = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    plain = call(pipe, 4, **window)
    assert not torch.equal(plain, call(pipe, 4))
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, 4, **window))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:3/trim")
    with pytest.raises(rapid3rt.UnsupportedError, match="counts something in steps"):
        call(pipe, 4, **window)


def test_three_steps_under_a_run_of_six_are_the_plain_three_steps(pipe: Any) -> None:
    plain = call(pipe, 3)
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(plain, call(pipe, 6))
    assert [i.nfe for i in rapid3rt.report(pipe).images] == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["threshold:0.3", "controller:0.2", "steps:3/trim/ab2"])
def test_a_batch_equals_its_singles_and_a_saved_trace_replays_it(
    pipe: Any, policy: str, tmp_path: Path
) -> None:
    rapid3rt.accelerate(pipe, policy)
    batch = call(pipe, 6)
    whole = rapid3rt.report(pipe)
    whole.save(tmp_path / "trace.json")
    for i, prompt in enumerate(PROMPTS):
        alone = call(pipe, 6, [prompt], first=i)
        # Plain diffusers itself differs by 2e-7 to 5e-7 a step between batch sizes; guidance 7 multiplies that.
        assert (alone[0] - batch[i]).abs().max() <= 1e-4 * batch[i].abs().max()
        assert rapid3rt.report(pipe).images[0].timeline == whole.images[i].timeline
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(batch, call(pipe, 6))


@pytest.mark.parametrize("policy", ["auto", "dense", "threshold:0.01", "controller:0.05"])
def test_a_budget_is_never_exceeded_and_every_image_ends(pipe: Any, policy: str) -> None:
    rapid3rt.accelerate(pipe, policy, budget=2)
    call(pipe, 5)
    report = rapid3rt.report(pipe)
    assert all(1 <= i.nfe <= 2 for i in report.images)
    assert all(ticks[-1].next_sigma == 0 for ticks in report.trace.images)


def test_a_budget_above_the_steps_is_an_error_before_any_evaluation(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, budget=9)
    with pytest.raises(ValueError, match=r"budget must be 1 to 4 .* got 9"):
        call(pipe, 4)
    rapid3rt.restore(pipe)
    assert call(pipe, 1).isfinite().all()


def test_restore_leaves_no_trace(pipe: Any) -> None:
    call(pipe, 1)
    transformer, scheduler, keys = pipe.transformer, pipe.scheduler, set(pipe.transformer.__dict__)
    rapid3rt.accelerate(pipe, "threshold:0.5")
    call(pipe, 3)
    rapid3rt.restore(pipe)
    assert pipe.transformer is transformer
    assert pipe.scheduler is scheduler
    assert set(transformer.__dict__) == keys


def test_a_shift_that_was_set_while_accelerated_stays_set(pipe: Any) -> None:
    before = pipe.scheduler.shift
    rapid3rt.accelerate(pipe, "steps:3")
    pipe.scheduler.set_shift(5.0)
    assert pipe.scheduler.shift == 5.0
    rapid3rt.restore(pipe)
    assert pipe.scheduler.shift == 5.0
    pipe.scheduler.set_shift(before)


def test_an_exception_in_the_middle_leaves_the_next_run_clean(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "threshold:0.3")
    expected = call(pipe, 4)

    def stop(_pipe: Any, step: int, _t: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        call(pipe, 4, callback_on_step_end=stop)
    assert torch.equal(expected, call(pipe, 4))


@pytest.mark.slow
def test_sparse_levels_change_the_image_a_little_and_are_reported(
    pipe: Any, tmp_path: Path
) -> None:
    from rapid3rt.policies import FixedPlan, ScheduleTick, save_schedule

    plain = call(pipe, 3)
    sigmas = [float(s) for s in pipe.scheduler.sigmas[:-1]]
    ticks = tuple(ScheduleTick(sigma=s, level=1 if i else 0) for i, s in enumerate(sigmas))
    family = "flux" if "Flux" in type(pipe).__name__ else "sd3"
    save_schedule(FixedPlan(family=family, ticks=ticks), tmp_path / "sparse.json")
    rapid3rt.accelerate(pipe, f"schedule:{tmp_path / 'sparse.json'}")
    sparse = call(pipe, 3)
    assert not torch.equal(plain, sparse)
    assert (plain - sparse).abs().mean() < 0.2 * plain.abs().mean()
    assert rapid3rt.report(pipe).images[0].timeline == "C11"


@pytest.mark.slow
def test_several_images_of_one_prompt_are_images_of_their_own(pipe: Any) -> None:
    noise = [torch.Generator().manual_seed(i) for i in range(4)]
    arguments: dict[str, Any] = {
        "max_sequence_length": 32,
        "output_type": "latent",
        "num_images_per_prompt": 2,
    }
    plain = pipe(PROMPTS[:2], num_inference_steps=2, generator=noise, **arguments).images
    rapid3rt.accelerate(pipe, "dense")
    noise = [torch.Generator().manual_seed(i) for i in range(4)]
    assert torch.equal(
        plain, pipe(PROMPTS[:2], num_inference_steps=2, generator=noise, **arguments).images
    )
    assert len(rapid3rt.report(pipe).images) == 4


@pytest.mark.slow
def test_a_speed_is_a_mean_and_gives_every_prompt_what_it_gets_alone(pipe: Any) -> None:
    easy = "a red circle center on plain navy ground"
    hard = (
        "a green ring center, a white cross top, a blue square left, a purple diamond right, "
        "a yellow circle bottom and a red triangle top-left on checkered teal ground"
    )
    rapid3rt.accelerate(pipe, speed=4.0)
    together = call(pipe, 28, [easy, hard], guidance_scale=3.5)
    spent = [i.nfe for i in rapid3rt.report(pipe).images]
    assert spent[0] < 7 < spent[1]
    assert any("mean of 7 evaluations" in note for note in rapid3rt.report(pipe).notes)
    for i, prompt in enumerate((easy, hard)):
        alone = call(pipe, 28, [prompt], first=i, guidance_scale=3.5)
        assert rapid3rt.report(pipe).images[0].nfe == spent[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
