# SPDX-License-Identifier: Apache-2.0
"""The tiny FLUX pipeline, distilled from the tiny SD3 one with its guidance inside, as FLUX.1 [dev] was.

The student sees a guidance scale g and learns the teacher's guided velocity u + g (c - u) in one evaluation. Same
VAE, scenes and captions; text encoders of its own: T5 carries the caption, CLIP its pooled summary. What the two
architectures share starts as the teacher's (from nothing, words were not bound to places after 2,000 steps): T5 first
learns the teacher's token embeddings, and every other joint block becomes a double block. Positions are all new: they
are rotary here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from rapid3rt.tiny import load_tiny, parts
from rapid3rt.tiny import scenes as world
from rapid3rt.tiny.sd3 import encode_prompts

GUIDANCE_RANGE = (1.0, 5.0)

# What decides T5's first stage; the layers, because their weights are drawn from the same numbers before it.
T5_FIELDS = (
    "seed",
    "num_latents",
    "batch",
    "warmup",
    "text_steps",
    "long_text_share",
    "double_layers",
    "single_layers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxRecipe(parts.Recipe):
    """Everything that decides the weights, but the teacher's."""

    steps: int = 7_000
    rate: float = 1e-3
    text_steps: int = 1_500
    long_text_share: float = 0.05
    """Share of steps whose captions are padded to the 512 T5 tokens of the pipeline's default call; a tenth of the
    others to 64, the rest to 32."""
    double_layers: int = 3
    single_layers: int = 3


def make_t5(vocab_size: int) -> T5EncoderModel:
    """A three-layer T5 encoder of width 128."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=128,
        d_kv=64,
        d_ff=256,
        num_layers=3,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=parts.PAD,
        eos_token_id=parts.EOS,
    )
    return T5EncoderModel(config)


def make_transformer(recipe: FluxRecipe) -> FluxTransformer2DModel:
    """256 image tokens of 2 x 2 latents, guidance embedding; the teacher's width, and head dim 64."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=recipe.double_layers,
        num_single_layers=recipe.single_layers,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


def train_flux(
    recipe: FluxRecipe,
    teacher: Any,
    table: torch.Tensor,
    work: Path,
    device: torch.device,
    compiled: bool = False,
) -> dict[str, nn.Module]:
    """Text encoders and transformer against the teacher's guided velocity. teacher: the tiny SD3 pipeline."""
    torch.manual_seed(recipe.seed)
    tokenizer = parts.make_tokenizer()
    model = nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(parts.make_clip_config(len(tokenizer))),
            "text_encoder_2": make_t5(len(tokenizer)),
            "transformer": make_transformer(recipe),
        }
    ).to(device)
    teacher.to(device)
    scenes = parts.training_scenes(recipe)
    path = work / "flux.safetensors"
    if not path.exists():
        read = train_t5(recipe, model["text_encoder_2"], teacher, tokenizer, scenes, work)
        start_from_teacher(model, read, teacher)
    average = parts.make_average(model, recipe)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    modules: dict[str, nn.Module] = {"model": model, "average": average}
    fields = parts.transformer_recipe(recipe)
    checkpoint = parts.Checkpoint(path, modules, optimiser, fields)
    start = checkpoint.load()
    if compiled:
        model["transformer"].compile(dynamic=False)
        teacher.transformer.compile(dynamic=False)
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc="flux")
    smooth = None
    for step in bar:
        parts.set_rate(optimiser, recipe.rate, step, recipe.steps, recipe.warmup)
        rng = parts.generator(recipe.seed, 14, step)
        rows = rng.integers(len(scenes), size=recipe.batch)
        drawn = [scenes[r] for r in rows]
        latents = table[torch.from_numpy(rows)].float().to(device)
        loss = _distillation_loss(recipe, model, teacher, tokenizer, latents, drawn, rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(model)
        if step % 20 == 0:
            value = float(loss.detach())
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            bar.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            checkpoint.save(step + 1)
    trained: Any = average.module.eval()
    return dict(trained.items())


def train_t5(
    recipe: FluxRecipe,
    t5: nn.Module,
    teacher: Any,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[world.Scene],
    work: Path,
) -> nn.Linear:
    """Teach T5 the teacher's token embeddings, up to the linear map that is returned: 128 to 128, biased."""
    device = next(t5.parameters()).device
    read = nn.Linear(128, 128).to(device)
    modules: dict[str, nn.Module] = {"t5": t5, "read": read}
    optimiser = torch.optim.AdamW([*t5.parameters(), *read.parameters()], weight_decay=0.01)
    fields = parts.deciding(recipe, T5_FIELDS)
    checkpoint = parts.Checkpoint(work / "t5.safetensors", modules, optimiser, fields)
    start = checkpoint.load()
    bar = tqdm(range(start, recipe.text_steps), initial=start, total=recipe.text_steps, desc="t5")
    for step in bar:
        parts.set_rate(optimiser, 2e-3, step, recipe.text_steps, recipe.warmup)
        rng = parts.generator(recipe.seed, 15, step)
        rows = rng.integers(len(scenes), size=2 * recipe.batch)
        captions = [world.train_caption(scenes[r], rng) for r in rows]
        ids = parts.tokenize(tokenizer, captions).to(device)
        with torch.no_grad():
            target, _ = encode_prompts(ids, (teacher.text_encoder, teacher.text_encoder_2))
        # Every length begins with the same tokens; what follows is padding, which T5 reads too.
        padded = parts.tokenize(tokenizer, captions, _text_length(recipe, rng)).to(device)
        told = read(t5(padded)[0][:, : ids.shape[1]])
        loss = ((told - target).square().mean((0, 1)) / target.var((0, 1)).clamp(min=1e-6)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*t5.parameters(), *read.parameters()], 1.0)
        optimiser.step()
        if step % 20 == 0:
            bar.set_postfix(unexplained=f"{float(loss.detach()):.4f}")
        if (step + 1) % 250 == 0 or step + 1 == recipe.text_steps:
            checkpoint.save(step + 1)
    return read


@torch.no_grad()
def start_from_teacher(model: nn.ModuleDict, read: nn.Linear, teacher: Any) -> None:
    """Copy what the teacher has under the same name; what is new starts as nothing added."""
    own: Any = model["transformer"]
    theirs, texts = teacher.transformer, teacher.text_encoder
    usable = len(theirs.transformer_blocks) - 1  # the last one drops the text
    for i, block in enumerate(own.transformer_blocks):
        source = theirs.transformer_blocks[min(2 * i, usable - 1)]
        block.load_state_dict(source.state_dict())
    own.x_embedder.weight.copy_(theirs.pos_embed.proj.weight.flatten(1))
    own.x_embedder.bias.copy_(theirs.pos_embed.proj.bias)
    own.context_embedder.weight.copy_(theirs.context_embedder.weight @ read.weight)
    own.context_embedder.bias.copy_(theirs.context_embedder(read.bias))
    model["text_encoder"].load_state_dict(texts.text_model.state_dict())
    time, their_time = own.time_text_embed, theirs.time_text_embed
    time.timestep_embedder.load_state_dict(their_time.timestep_embedder.state_dict())
    time.guidance_embedder.linear_2.weight.zero_()
    time.guidance_embedder.linear_2.bias.zero_()
    # CLIP here has no projection of its own, and there is one where the teacher has two.
    first = their_time.text_embedder.linear_1
    width = texts.config.projection_dim
    time.text_embedder.linear_1.weight.copy_(first.weight[:, :width] @ texts.text_projection.weight)
    time.text_embedder.linear_1.bias.copy_(first.bias)
    time.text_embedder.linear_2.load_state_dict(their_time.text_embedder.linear_2.state_dict())
    for block in own.single_transformer_blocks:
        gate = slice(2 * own.inner_dim, 3 * own.inner_dim)
        block.norm.linear.weight[gate] = 0
        block.norm.linear.bias[gate] = 0
    own.norm_out.load_state_dict(theirs.norm_out.state_dict())
    # A token's outputs: rows, columns, channels there; channels, rows, columns here.
    for mine, their in zip(own.proj_out.parameters(), theirs.proj_out.parameters(), strict=True):
        mine.copy_(their.unflatten(0, (2, 2, 4)).movedim(2, 0).flatten(0, 2))


def _text_length(recipe: FluxRecipe, rng: np.random.Generator) -> int:
    """A few lengths, not any length: each is compiled once."""
    if rng.random() < recipe.long_text_share:
        return 512
    return int(rng.choice((32, 64), p=(0.9, 0.1)))


def _distillation_loss(
    recipe: FluxRecipe,
    model: nn.ModuleDict,
    teacher: Any,
    tokenizer: PreTrainedTokenizerFast,
    x: torch.Tensor,
    scenes: list[world.Scene],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Weighted squared distance to the guided velocity at a noisy training latent."""
    device = x.device
    captions = [world.train_caption(scene, rng) for scene in scenes]
    noise = parts.draw_noise(x, rng)
    sigma = parts.draw_sigma(len(x), rng).to(device)
    guidance = torch.from_numpy(rng.uniform(*GUIDANCE_RANGE, len(x)).astype(np.float32)).to(device)
    length = _text_length(recipe, rng)
    t = sigma[:, None, None, None]
    noisy = (1 - t) * x + t * noise
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            target = guided_velocity(teacher, tokenizer, captions, noisy, sigma, guidance)
        pooled = model["text_encoder"](parts.tokenize(tokenizer, captions).to(device)).pooler_output
        prompt = model["text_encoder_2"](parts.tokenize(tokenizer, captions, length).to(device))[0]
        side = x.shape[-1] // 2
        velocity = model["transformer"](
            hidden_states=pack(noisy),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(length, 3, device=device),
            img_ids=grid_ids(side, device),
            return_dict=False,
        )[0]
    return parts.weighted_error(unpack(velocity, side), target, scenes, recipe)


def guided_velocity(
    teacher: Any,
    tokenizer: PreTrainedTokenizerFast,
    captions: list[str],
    x: torch.Tensor,
    sigma: torch.Tensor,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """The SD3 pipeline's classifier-free guidance at one scale per image: float32 `[n, 4, 32, 32]`."""
    ids = parts.tokenize(tokenizer, [*([""] * len(captions)), *captions]).to(x.device)
    prompt, pooled = encode_prompts(ids, (teacher.text_encoder, teacher.text_encoder_2))
    velocity = teacher.transformer(
        hidden_states=torch.cat([x, x]),
        encoder_hidden_states=prompt,
        pooled_projections=pooled,
        timestep=torch.cat([sigma, sigma]) * 1000,
        return_dict=False,
    )[0]
    empty, told = velocity.float().chunk(2)
    guided: torch.Tensor = empty + guidance[:, None, None, None] * (told - empty)
    return guided


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`[n, C, 2 h, 2 w]` to `[n, h w, 4 C]`, as the FLUX pipeline packs."""
    n, channels, height, width = latents.shape
    grid = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(n, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """The inverse of `pack` for `side` x `side` tokens."""
    grid: torch.Tensor = tokens.unflatten(1, (side, side)).unflatten(-1, (-1, 2, 2))
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * side, 2 * side)


def grid_ids(side: int, device: torch.device) -> torch.Tensor:
    """Positions of image tokens, `[side^2, 3]`: 0, row, column."""
    axis = torch.arange(side, device=device, dtype=torch.float32)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def assemble_flux(
    recipe: FluxRecipe, trained: dict[str, nn.Module], vae: AutoencoderKL, mean: float, scale: float
) -> FluxPipeline:
    """Put trained parts into the pipeline that users know; the shift depends on the resolution, as in FLUX.1."""
    vae.register_to_config(shift_factor=mean, scaling_factor=scale)
    tokenizer = parts.make_tokenizer()
    base = math.log(recipe.shift)
    return FluxPipeline(
        transformer=trained["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=base, max_shift=base + 0.65
        ),
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=trained["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=trained["text_encoder_2"],
        tokenizer_2=tokenizer,
    )


def build_flux(
    recipe: FluxRecipe, out: Path, work: Path, device: torch.device, compiled: bool = False
) -> None:
    """All stages, then the pipeline folder with `recipe.json` beside it. The teacher is the bundled SD3 pipeline."""
    work.mkdir(parents=True, exist_ok=True)
    vae = parts.train_vae(recipe, work, device)
    table, mean, scale = parts.encode_table(recipe, vae, work)
    trained = train_flux(recipe, load_tiny("sd3"), table, work, device, compiled)
    save_flux(recipe, assemble_flux(recipe, trained, vae, mean, scale).to("cpu"), out)


def save_flux(recipe: FluxRecipe, pipe: FluxPipeline, out: Path) -> None:
    """Write the pipeline folder with `recipe.json` beside it; transformer and VAE in half precision."""
    for part in (pipe.transformer, pipe.vae):
        part.half()
    pipe.save_pretrained(out)
    document = {"model": "flux"} | asdict(recipe)
    (out / "recipe.json").write_text(json.dumps(document, indent=1) + "\n")
