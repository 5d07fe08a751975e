# SPDX-License-Identifier: Apache-2.0
"""Make the tiny pipelines: `python -m rapid3rt.tiny.build sd3 --out DIR --work DIR`.

Three stages, each resumable from its own checkpoint in the work folder: the VAE on drawn scenes; a table of encoded
latents; text encoders and transformer together, by flow matching. The last stage keeps an exponential average of the
weights, which is what ships. Everything is drawn from counters (seed, step), so a resumed run sees the same batches.
CPU or GPU; matrix products in bfloat16 where the processor is fast at it, weights and optimiser in float32.
"""

from __future__ import annotations

import argparse
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rapid3rt.tiny import scenes as world

PAD, BOS, UNK, EOS = 0, 1, 2, 3
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights. Units: steps are optimiser steps; rates are peak learning rates."""

    seed: int = 1
    vae_steps: int = 1000
    decoder_steps: int = 500
    """Steps that follow for the decoder alone, on the posterior's means: the table of latents needs no new encoding."""
    vae_batch: int = 24
    vae_rate: float = 3e-3
    kl_weight: float = 1e-5
    num_latents: int = 40_000
    steps: int = 11_500
    batch: int = 32
    rate: float = 1.5e-3
    warmup: int = 200
    ema: float = 0.999
    long_text_share: float = 0.1
    """Share of steps that see the 256 empty T5 tokens of the pipeline's default call; the others see 0, 8 or 32."""
    object_weight: float = 8.0
    """Weight of the loss on and beside objects, 1 elsewhere: one object covers a twentieth of the picture, and its
    shape would be drowned by the ground's noise. The minimiser is the same."""
    layers: int = 6
    heads: int = 2
    shift: float = 5.0
    """Of the scheduler, not of the training: the plain pipeline's smallest error at 6, 8 and 28 steps."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's vocabulary; unknown words and punctuation are dropped or unknown."""
    words = [
        "a",
        "and",
        "on",
        "ground",
        *world.COLOURS,
        *world.SHAPES,
        *world.PLACES,
        *world.TEXTURES,
    ]
    words += list(world.GROUNDS)
    vocab = {"<pad>": PAD, "<bos>": BOS, "<unk>": UNK, "<eos>": EOS}
    for word in words:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[.,;:!?]"), " "),
            normalizers.Replace(Regex(r"\b(at|in|the|to|of)\b"), " "),
            normalizers.Replace(Regex(r"(?<=top|bottom) (?=left|right)"), "-"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="right",
    )


def make_text_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    """A three-layer CLIP text encoder, width 64; SD3 reads its second layer and its pooled output."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return CLIPTextModelWithProjection(config)


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
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    encoder = T5EncoderModel(config).eval()
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder


def make_vae() -> AutoencoderKL:
    """Factor 2, four latent channels: 64 x 64 pixels become 32 x 32."""
    return AutoencoderKL(
        block_out_channels=(24, 48),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_sd3_transformer(recipe: Recipe) -> SD3Transformer2DModel:
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


class Checkpoint:
    """Atomic safetensors snapshots of modules, an AdamW and a step counter. One file per stage."""

    def __init__(
        self, path: Path, modules: dict[str, nn.Module], optimiser: torch.optim.AdamW
    ) -> None:
        self.path, self.modules, self.optimiser = path, modules, optimiser

    def save(self, step: int) -> None:
        """Write everything, then rename: an interrupted save leaves the previous file."""
        tensors = {
            f"module/{m}/{k}": v.detach().clone(memory_format=torch.contiguous_format)
            for m, module in self.modules.items()
            for k, v in module.state_dict().items()
        }
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {
                f"optimiser/{i}/{k}": v.clone(memory_format=torch.contiguous_format)
                for k, v in state.items()
            }
        scratch = self.path.with_suffix(".tmp")
        save_file(tensors, scratch, metadata={"step": str(step)})
        scratch.replace(self.path)

    def load(self) -> int:
        """Restore and return the step to go on with; 0 where there is no file."""
        if not self.path.exists():
            return 0
        tensors = load_file(self.path)
        for m, module in self.modules.items():
            prefix = f"module/{m}/"
            module.load_state_dict(
                {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            )
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser/"):
                _, i, name = key.split("/")
                state.setdefault(int(i), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        with safe_open(self.path, framework="pt") as file:
            return int(file.metadata()["step"])


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _set_rate(
    optimiser: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int
) -> None:
    """Linear warm-up, then cosine to 1 % of the peak."""
    progress = max(step - warmup, 0) / max(steps - warmup, 1)
    rate = (
        peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))
    )
    for group in optimiser.param_groups:
        group["lr"] = rate


def train_vae(recipe: Recipe, work: Path, device: torch.device) -> AutoencoderKL:
    """Stage 1: mean squared error and a KL term on drawn scenes; then the decoder alone, without the noise."""
    torch.manual_seed(recipe.seed)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    checkpoint = Checkpoint(work / "vae.safetensors", {"vae": vae}, _vae_optimiser(vae))
    _train_vae_phase(recipe, vae, checkpoint, recipe.vae_steps, noise=True)
    optimiser = _vae_optimiser(vae.decoder)
    checkpoint = Checkpoint(work / "decoder.safetensors", {"vae": vae}, optimiser)
    _train_vae_phase(recipe, vae, checkpoint, recipe.decoder_steps, noise=False)
    return vae.eval()


def _vae_optimiser(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=0.0)


def _train_vae_phase(
    recipe: Recipe, vae: AutoencoderKL, checkpoint: Checkpoint, steps: int, noise: bool
) -> None:
    """With noise: encoder and decoder on samples of the posterior. Without: the decoder on its means."""
    device = next(vae.parameters()).device
    start = checkpoint.load()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae" if noise else "decoder")
    optimiser = checkpoint.optimiser
    for step in bar:
        _set_rate(optimiser, recipe.vae_rate, step, steps, 50)
        seed = int(_generator(recipe.seed, 11 if noise else 12, step).integers(2**31))
        images = world.draw(world.sample(recipe.vae_batch, seed, "train")).to(device) * 2 - 1
        noise_source = torch.Generator(device).manual_seed(seed)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(noise):
                posterior = vae.encode(
                    images.contiguous(memory_format=torch.channels_last)
                ).latent_dist
            # A tenth of the latents' spread stands for what a diffusion model leaves imprecise.
            spread = posterior.std if noise else 0.1 * posterior.mean.std()
            latents = posterior.mean + spread * torch.randn(
                posterior.mean.shape, generator=noise_source, device=device
            )
            decoded = vae.decode(latents).sample
        error = F.mse_loss(decoded.float(), images)
        loss = error + recipe.kl_weight * posterior.kl().float().mean() / 4 if noise else error
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # Only what this phase trains: the encoder may still hold gradients of the phase before.
        nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
        optimiser.step()
        if step % 20 == 0:
            bar.set_postfix(psnr=f"{float(10 * torch.log10(4 / error.detach())):.1f} dB")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            checkpoint.save(step + 1)


@torch.no_grad()
def encode_table(
    recipe: Recipe, vae: AutoencoderKL, work: Path
) -> tuple[torch.Tensor, float, float]:
    """Stage 2: latents of the training scenes, normalised: bf16 `[n, 4, 32, 32]`, with their shift and scale."""
    path = work / "latents.safetensors"
    if not path.exists():
        device = next(vae.parameters()).device
        chunks = []
        for start in tqdm(range(0, recipe.num_latents, 100), desc="latents"):
            images = world.draw(_train_scenes(recipe, start, 100)).to(device) * 2 - 1
            with torch.autocast(device.type, torch.bfloat16):
                latents = vae.encode(
                    images.contiguous(memory_format=torch.channels_last)
                ).latent_dist.mean
            chunks.append(latents.float().cpu())
        table = torch.cat(chunks)
        mean, std = table.mean(), table.std()
        table = ((table - mean) / std).to(torch.bfloat16).contiguous()
        scratch = path.with_suffix(".tmp")
        save_file({"latents": table, "mean": mean, "std": std}, scratch)
        scratch.replace(path)
    stored = load_file(path)
    return stored["latents"], float(stored["mean"]), 1 / float(stored["std"])


def _train_scenes(recipe: Recipe, start: int, count: int) -> list[world.Scene]:
    """Scenes of the table, in blocks of 100 with a seed each, so that any block can be drawn again."""
    return world.sample(count, recipe.seed * 1_000_000 + start, "train")


def encode_prompts(
    ids: torch.Tensor, encoders: Iterable[nn.Module]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the SD3 pipeline makes of token ids: embeddings `[B, L, 128]` and pooled `[B, 128]`."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat(
        [o[0] for o in outputs], -1
    )


def train_sd3(
    recipe: Recipe, table: torch.Tensor, work: Path, device: torch.device, compiled: bool = False
) -> dict[str, nn.Module]:
    """Stage 3: text encoders and transformer by flow matching (x_t = (1 - t) x + t n, target n - x)."""
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = nn.ModuleDict(
        {
            "text_encoder": make_text_encoder(len(tokenizer)),
            "text_encoder_2": make_text_encoder(len(tokenizer)),
            "transformer": make_sd3_transformer(recipe),
        }
    ).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    )
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = Checkpoint(
        work / "sd3.safetensors", {"model": model, "average": average}, optimiser
    )
    start = checkpoint.load()
    if compiled:
        model["transformer"].compile(dynamic=False)
    scenes: list[world.Scene] = []
    for begin in tqdm(range(0, recipe.num_latents, 100), desc="captions"):
        scenes += _train_scenes(recipe, begin, 100)
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc="sd3")
    smooth = None
    for step in bar:
        _set_rate(optimiser, recipe.rate, step, recipe.steps, recipe.warmup)
        rng = _generator(recipe.seed, 13, step)
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
    recipe: Recipe,
    model: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    latents: torch.Tensor,
    scenes: list[world.Scene],
    rng: np.random.Generator,
    device: torch.device,
) -> torch.Tensor:
    """Weighted mean squared error of the velocity; noise levels half uniform, half logit-normal."""
    captions = [world.train_caption(scene, rng) for scene in scenes]
    ids = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids.to(device)
    x = latents.float().to(device)
    source = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(x.shape, generator=source, device=device)
    uniform, normal = rng.random(len(x)), 1 / (1 + np.exp(-rng.normal(0.3, 1.0, len(x))))
    mixed = np.where(rng.random(len(x)) < 0.5, uniform, normal).astype(np.float32)
    sigma = torch.from_numpy(mixed).to(device)
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
    weight = 1 + (recipe.object_weight - 1) * _near_objects(scenes, x.shape[-1]).to(device)[:, None]
    loss: torch.Tensor = (weight / weight.mean() * (velocity.float() - (noise - x)).square()).mean()
    return loss


def _near_objects(scenes: list[world.Scene], side: int) -> torch.Tensor:
    """1 within two pixels of an object's square, 0 elsewhere: float32 `[n, side, side]` over the latents."""
    pixel = world.IMAGE_SIZE / side
    centre = (torch.arange(side) + 0.5) * pixel
    mask = torch.zeros(len(scenes), side, side)
    for out, scene in zip(mask, scenes, strict=True):
        for item in scene.objects:
            reach = item.radius + 2
            rows, columns = (centre - item.y).abs() <= reach, (centre - item.x).abs() <= reach
            out[rows[:, None] & columns[None, :]] = 1.0
    return mask


def assemble_sd3(
    recipe: Recipe, parts: dict[str, nn.Module], vae: AutoencoderKL, mean: float, scale: float
) -> StableDiffusion3Pipeline:
    """Put trained parts into the pipeline that users know."""
    vae.register_to_config(shift_factor=mean, scaling_factor=scale)
    tokenizer = make_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=parts["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.shift),
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=parts["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=parts["text_encoder_2"],
        tokenizer_2=tokenizer,
        text_encoder_3=make_silent_t5(len(tokenizer)),
        tokenizer_3=tokenizer,
    )


def build_sd3(
    recipe: Recipe, out: Path, work: Path, device: torch.device, compiled: bool = False
) -> None:
    """All stages, then the pipeline folder with `recipe.json` beside it."""
    work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(recipe, work, device)
    table, mean, scale = encode_table(recipe, vae, work)
    parts = train_sd3(recipe, table, work, device, compiled)
    pipe = assemble_sd3(recipe, parts, vae, mean, scale).to("cpu")
    save_sd3(recipe, pipe, out)


def save_sd3(recipe: Recipe, pipe: StableDiffusion3Pipeline, out: Path) -> None:
    """Write the pipeline folder with `recipe.json` beside it.

    Transformer and VAE in half precision: diffusers loads them as float32, transformers would keep it.
    """
    for part in (pipe.transformer, pipe.vae):
        part.half()
    pipe.save_pretrained(out)
    document = {"model": "sd3"} | asdict(recipe)
    (out / "recipe.json").write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of the recipe can be overridden by name."""
    parser = argparse.ArgumentParser(description="Train a tiny pipeline of the scene world.")
    parser.add_argument("model", choices=["sd3"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of checkpoints; the run resumes from it"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer: 1.3x faster on two cores"
    )
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    out, work, device = options.pop("out"), options.pop("work"), torch.device(options.pop("device"))
    options.pop("model")
    compiled = options.pop("compile")
    build_sd3(Recipe(**options), out, work, device, compiled)


if __name__ == "__main__":
    main()
