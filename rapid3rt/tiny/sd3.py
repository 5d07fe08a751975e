# SPDX-License-Identifier: Apache-2.0
"""The tiny SD3 pipeline: text encoders and transformer learn together, by flow matching."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rapid3rt.tiny import parts
from rapid3rt.tiny import scenes as world


@dataclass(frozen=True, slots=True, kw_only=True)
class SD3Recipe(parts.Recipe):
    """Everything that decides the weights."""

    steps: int = 11_500
    rate: float = 1.5e-3
    long_text_share: float = 0.1
    """Share of steps that see the 256 empty T5 tokens of the pipeline's default call; the others see 0, 8 or 32."""
    layers: int = 6
    heads: int = 2


def make_text_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    """SD3 reads its second layer and its pooled output."""
    return CLIPTextModelWithProjection(parts.make_clip_config(vocab_size))


def make_silent_t5(vocab_size: int) -> T5EncoderModel:
    """A T5 encoder that says nothing: its last norm has weight 0, so it gives zeros at any length.

    The CLIP encoders carry the caption. Without a third encoder the pipeline would append the same zeros, but
    `from_pretrained` would insist on being told that the part is missing.
    """
    config = T5Config(
        vocab_size=vocab_size,
        d_model=128,
        d_kv=16,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=parts.PAD,
        eos_token_id=parts.EOS,
    )
    encoder = T5EncoderModel(config).eval()
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder


def make_sd3_transformer(recipe: SD3Recipe) -> SD3Transformer2DModel:
    """256 image tokens of 2 x 2 latents, head dim 64, normalised queries and keys."""
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=recipe.layers,
        attention_head_dim=64,
        num_attention_heads=recipe.heads,
        joint_attention_dim=128,
        caption_projection_dim=64 * recipe.heads,
        pooled_projection_dim=128,
        out_channels=4,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def encode_prompts(
    ids: torch.Tensor, encoders: Iterable[nn.Module]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the SD3 pipeline makes of token ids: embeddings `[B, L, 128]` and pooled `[B, 128]`."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat(
        [o[0] for o in outputs], -1
    )


def train_sd3(
    recipe: SD3Recipe, table: torch.Tensor, work: Path, device: torch.device, compiled: bool = False
) -> dict[str, nn.Module]:
    """Stage 3: text encoders and transformer by flow matching (x_t = (1 - t) x + t n, target n - x)."""
    torch.manual_seed(recipe.seed)
    tokenizer = parts.make_tokenizer()
    model = nn.ModuleDict(
        {
            "text_encoder": make_text_encoder(len(tokenizer)),
            "text_encoder_2": make_text_encoder(len(tokenizer)),
            "transformer": make_sd3_transformer(recipe),
        }
    ).to(device)
    average = parts.make_average(model, recipe)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = parts.Checkpoint(
        work / "sd3.safetensors",
        {"model": model, "average": average},
        optimiser,
        parts.transformer_recipe(recipe),
    )
    start = checkpoint.load()
    if compiled:
        model["transformer"].compile(dynamic=False)
    scenes = parts.training_scenes(recipe)
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc="sd3")
    smooth = None
    for step in bar:
        parts.set_rate(optimiser, recipe.rate, step, recipe.steps, recipe.warmup)
        rng = parts.generator(recipe.seed, 13, step)
        rows = rng.integers(len(scenes), size=recipe.batch)
        drawn = [scenes[r] for r in rows]
        latents = table[torch.from_numpy(rows)]
        loss = _flow_loss(recipe, model, tokenizer, latents, drawn, rng, device)
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


def _flow_loss(
    recipe: SD3Recipe,
    model: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    latents: torch.Tensor,
    scenes: list[world.Scene],
    rng: np.random.Generator,
    device: torch.device,
) -> torch.Tensor:
    """Weighted mean squared error of the velocity; noise levels half uniform, half logit-normal."""
    captions = [world.train_caption(scene, rng) for scene in scenes]
    ids = parts.tokenize(tokenizer, captions).to(device)
    x = latents.float().to(device)
    noise = parts.draw_noise(x, rng)
    sigma = parts.draw_sigma(len(x), rng).to(device)
    # A few lengths, not any length: each is compiled once.
    empty_tokens = 256 if rng.random() < recipe.long_text_share else int(rng.choice((0, 8, 32)))
    t = sigma[:, None, None, None]
    with torch.autocast(device.type, torch.bfloat16):
        prompt, pooled = encode_prompts(ids, (model["text_encoder"], model["text_encoder_2"]))
        prompt = F.pad(prompt, (0, 0, 0, empty_tokens))
        velocity = model["transformer"](
            hidden_states=(1 - t) * x + t * noise,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
    return parts.weighted_error(velocity, noise - x, scenes, recipe)


def assemble_sd3(
    recipe: SD3Recipe, trained: dict[str, nn.Module], vae: AutoencoderKL, mean: float, scale: float
) -> StableDiffusion3Pipeline:
    """Put trained parts into the pipeline that users know."""
    vae.register_to_config(shift_factor=mean, scaling_factor=scale)
    tokenizer = parts.make_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=trained["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.shift),
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=trained["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=trained["text_encoder_2"],
        tokenizer_2=tokenizer,
        text_encoder_3=make_silent_t5(len(tokenizer)),
        tokenizer_3=tokenizer,
    )


def build_sd3(
    recipe: SD3Recipe, out: Path, work: Path, device: torch.device, compiled: bool = False
) -> None:
    """All stages, then the pipeline folder with `recipe.json` beside it."""
    work.mkdir(parents=True, exist_ok=True)
    vae = parts.train_vae(recipe, work, device)
    table, mean, scale = parts.encode_table(recipe, vae, work)
    trained = train_sd3(recipe, table, work, device, compiled)
    pipe = assemble_sd3(recipe, trained, vae, mean, scale).to("cpu")
    save_sd3(recipe, pipe, out)


def save_sd3(recipe: SD3Recipe, pipe: StableDiffusion3Pipeline, out: Path) -> None:
    """Write the pipeline folder with `recipe.json` beside it.

    Transformer and VAE in half precision: diffusers loads them as float32, transformers would keep it.
    """
    for part in (pipe.transformer, pipe.vae):
        part.half()
    pipe.save_pretrained(out)
    document = {"model": "sd3"} | asdict(recipe)
    (out / "recipe.json").write_text(json.dumps(document, indent=1) + "\n")
