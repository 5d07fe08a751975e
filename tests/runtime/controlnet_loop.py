# SPDX-License-Identifier: Apache-2.0
"""The definition of an accelerated ControlNet run: one image, one guidance branch at a time, float32, slow.

A computed tick goes through the plain forwards of diffusers, ControlNet and transformer; a reused one adds to the
embedded latents what the block stack added to them at the last compute. Nothing of the runtime is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

GUIDANCE, TRUE_CFG = 3.5, 3.0
Prompt = tuple[torch.Tensor, torch.Tensor]  # text `[1, T, D]` and pooled text `[1, P]`


@dataclass(frozen=True, slots=True)
class Word:
    """What one image is told: c(ompute) or r(euse) at each tick, and where to go: a sigma, or a grid index."""

    actions: str
    targets: tuple[float | int, ...]

    def sigma(self, tick: int, grid: Sequence[float]) -> float:
        target = self.targets[tick]
        return grid[target] if isinstance(target, int) else target


@torch.no_grad()
def denoise(
    pipe: Any, one: dict[str, Any], word: Word, grid: Sequence[float], cfg: bool
) -> torch.Tensor:
    """Latents of one image by its word. pipe: plain; one: the arguments of its call for this image."""
    prompts = [(one["prompt_embeds"], one["pooled_prompt_embeds"])]
    if cfg:
        prompts.append((one["negative_prompt_embeds"], one["negative_pooled_prompt_embeds"]))
    images = one["control_image"]
    images = images if isinstance(images, list) else [images]
    family = Flux if "Flux" in type(pipe).__name__ else SD3
    model = family(pipe, images, one["controlnet_conditioning_scale"])
    x, now = one["latents"], grid[0]
    for tick, action in enumerate(word.actions):
        velocities = []
        for branch, prompt in enumerate(prompts):
            if action == "c":
                velocities.append(model.compute(branch, prompt, prompts[0], x, now))
            else:
                velocities.append(model.reuse(branch, prompt, x, now))
        velocity = velocities[0]
        if cfg:
            velocity = velocities[1] + model.guidance * (velocities[0] - velocities[1])
        following = word.sigma(tick, grid)
        assert following < now
        x, now = x + (following - now) * velocity, following
    assert now == 0
    return x


@dataclass
class Family:
    """The plain models of a pipeline, for one image. scale: of the ControlNet, one for each net of a Multi."""

    pipe: Any
    images: list[torch.Tensor]
    scale: Any
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)

    def run(self, branch: int, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Velocity of the plain forward; keeps the residual of its block stack."""
        tokens, transformer = list[torch.Tensor](), self.pipe.transformer
        handle = transformer.norm_out.register_forward_pre_hook(
            lambda _module, arguments: tokens.append(arguments[0])
        )
        velocity: torch.Tensor = transformer(**arguments, return_dict=False)[0]
        handle.remove()
        self.residuals[branch] = tokens[0] - self.embed(x)
        return velocity

    def project(self, branch: int, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Tokens of a reused velocity: final norm and projection at the current time."""
        hidden = self.embed(x) + self.residuals[branch]
        out: torch.Tensor = self.pipe.transformer.proj_out(
            self.pipe.transformer.norm_out(hidden, temb)
        )
        return out

    def of_nets(self, values: list[Any]) -> Any:
        """What a ControlNet takes: one value, or for a Multi one for each net."""
        return values if hasattr(self.pipe.controlnet, "nets") else values[0]

    def encode(self, image: torch.Tensor, shift: float) -> torch.Tensor:
        vae = self.pipe.vae
        latents: torch.Tensor = vae.encode(image).latent_dist.mode()
        return (latents - shift) * vae.config.scaling_factor


class SD3(Family):
    """Each branch has a ControlNet run of its own, of its own text; without pooled text, hence without a shift."""

    guidance = GUIDANCE

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pipe.transformer.pos_embed(x)
        return out

    def compute(
        self, branch: int, prompt: Prompt, _cond: Prompt, x: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        text, pooled = prompt
        given: dict[str, Any] = {"hidden_states": x, "encoder_hidden_states": text}
        given["timestep"] = torch.tensor([1000 * sigma])
        (samples,) = self.pipe.controlnet(
            **given,
            pooled_projections=torch.zeros_like(pooled),
            controlnet_cond=self.of_nets([self.encode(i, 0.0) for i in self.images]),
            conditioning_scale=self.scale,
            return_dict=False,
        )
        given |= {"pooled_projections": pooled, "block_controlnet_hidden_states": samples}
        return self.run(branch, x, given)

    def reuse(self, branch: int, prompt: Prompt, x: torch.Tensor, sigma: float) -> torch.Tensor:
        temb = self.pipe.transformer.time_text_embed(torch.tensor([1000 * sigma]), prompt[1])
        return self.project(branch, x, temb).mT.reshape(x.shape)


class Flux(Family):
    """The unconditional branch takes what the ControlNet gives for the conditional text."""

    guidance = TRUE_CFG

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pipe.transformer.x_embedder(x)
        return out

    def distilled(self, net: Any) -> torch.Tensor | None:
        return torch.tensor([GUIDANCE]) if net.config.guidance_embeds else None

    def compute(
        self, branch: int, prompt: Prompt, cond: Prompt, x: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        transformer, net = self.pipe.transformer, self.pipe.controlnet
        latents = [self.encode(i, self.pipe.vae.config.shift_factor) for i in self.images]
        packed = [self.pipe._pack_latents(c, 1, 4, *c.shape[2:]) for c in latents]
        given: dict[str, Any] = {"hidden_states": x, "timestep": torch.tensor([sigma])}
        given["txt_ids"] = torch.zeros(9, 3)
        given["img_ids"] = torch.cartesian_prod(torch.zeros(1), *[torch.arange(8.0)] * 2)
        double, single = net(
            **given,
            encoder_hidden_states=cond[0],
            pooled_projections=cond[1],
            guidance=self.distilled(net.nets[0] if hasattr(net, "nets") else net),
            controlnet_cond=self.of_nets(packed),
            controlnet_mode=self.of_nets([torch.tensor([-1])] * len(packed)),
            conditioning_scale=self.scale,
            return_dict=False,
        )
        given |= {"encoder_hidden_states": prompt[0], "pooled_projections": prompt[1]}
        given["guidance"] = self.distilled(transformer)
        given |= {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return self.run(branch, x, given)

    def reuse(self, branch: int, prompt: Prompt, x: torch.Tensor, sigma: float) -> torch.Tensor:
        guidance = self.distilled(self.pipe.transformer)
        distilled = [] if guidance is None else [1000 * guidance]
        time = torch.tensor([1000 * sigma])
        temb = self.pipe.transformer.time_text_embed(time, *distilled, prompt[1])
        return self.project(branch, x, temb)
