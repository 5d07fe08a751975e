# SPDX-License-Identifier: Apache-2.0
"""What the builds of all tiny pipelines share: recipe, tokenizer, VAE, table of latents, checkpoints.

Everything is drawn from counters (seed, step), so a resumed run sees the same batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, PreTrainedTokenizerFast

from rapid3rt.tiny import scenes as world

PAD, BOS, UNK, EOS = 0, 1, 2, 3
MAX_TOKENS = 32

# The fields of a recipe that decide a stage; the transformers depend on all but NOT_TRAINED_WITH.
VAE_FIELDS = ("seed", "vae_steps", "vae_batch", "vae_rate", "kl_weight")
TABLE_FIELDS = (*VAE_FIELDS, "num_latents")
DECODER_FIELDS = (*VAE_FIELDS, "decoder_steps")
NOT_TRAINED_WITH = ("decoder_steps", "shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the weights of any of them. Units: steps are optimiser steps; rates are peak learning rates."""

    seed: int = 1
    vae_steps: int = 1000
    decoder_steps: int = 500
    """Steps that follow for the decoder alone, on the posterior's means: the table of latents needs no new encoding."""
    vae_batch: int = 24
    vae_rate: float = 3e-3
    kl_weight: float = 1e-5
    num_latents: int = 40_000
    batch: int = 32
    warmup: int = 200
    ema: float = 0.999
    object_weight: float = 8.0
    """Weight of the loss on and beside objects, 1 elsewhere: one object covers a twentieth of the picture, and its
    shape would be drowned by the ground's noise. The minimiser is the same."""
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


def make_clip_config(vocab_size: int) -> CLIPTextConfig:
    """A three-layer CLIP text encoder of width 64."""
    return CLIPTextConfig(
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


def deciding(recipe: Recipe, fields: Iterable[str]) -> dict[str, float]:
    """The values of some fields of a recipe."""
    return {name: getattr(recipe, name) for name in fields}


def transformer_recipe(recipe: Recipe) -> dict[str, float]:
    """What decides the trained weights of a pipeline, its VAE's decoder aside."""
    return {k: v for k, v in asdict(recipe).items() if k not in NOT_TRAINED_WITH}


def check_recipe(path: Path, recipe: dict[str, float]) -> dict[str, str]:
    """Return a file's metadata. Raise ValueError where it was made by another recipe; files that tell none pass."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    made_by = json.loads(metadata.get("recipe", "{}"))
    for field, value in recipe.items():
        if made_by.get(field, value) != value:
            raise ValueError(
                f"{path} must be of a recipe with {field} = {value}, got {made_by[field]}; give another --work folder"
            )
    return metadata


class Checkpoint:
    """Atomic safetensors snapshots of modules, an AdamW and a step counter. One file per stage.

    recipe: the fields that decide the stage; a file of another recipe is refused.
    """

    def __init__(
        self,
        path: Path,
        modules: dict[str, nn.Module],
        optimiser: torch.optim.AdamW,
        recipe: dict[str, float],
    ) -> None:
        self.path, self.modules, self.optimiser, self.recipe = path, modules, optimiser, recipe

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
        metadata = {"step": str(step), "recipe": json.dumps(self.recipe)}
        save_file(tensors, scratch, metadata=metadata)
        scratch.replace(self.path)

    def load(self) -> int:
        """Restore and return the step to go on with; 0 where there is no file."""
        if not self.path.exists():
            return 0
        step = int(check_recipe(self.path, self.recipe)["step"])
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
        return step


def generator(*key: int) -> np.random.Generator:
    """A source of random numbers that depends on its key alone: (seed, purpose, step)."""
    return np.random.default_rng(key)


def set_rate(
    optimiser: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int
) -> None:
    """Linear warm-up over `warmup` steps, none for 0; then cosine to 1 % of the peak."""
    progress = max(step - warmup, 0) / max(steps - warmup, 1)
    warm = min(1.0, (step + 1) / max(warmup, 1))
    rate = peak * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))
    for group in optimiser.param_groups:
        group["lr"] = rate


def train_vae(recipe: Recipe, work: Path, device: torch.device) -> AutoencoderKL:
    """Stage 1: mean squared error and a KL term on drawn scenes; then the decoder alone, without the noise."""
    torch.manual_seed(recipe.seed)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    fields = deciding(recipe, VAE_FIELDS)
    checkpoint = Checkpoint(work / "vae.safetensors", {"vae": vae}, _vae_optimiser(vae), fields)
    _train_vae_phase(recipe, vae, checkpoint, recipe.vae_steps, noise=True)
    optimiser = _vae_optimiser(vae.decoder)
    fields = deciding(recipe, DECODER_FIELDS)
    checkpoint = Checkpoint(work / "decoder.safetensors", {"vae": vae}, optimiser, fields)
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
        set_rate(optimiser, recipe.vae_rate, step, steps, 50)
        seed = int(generator(recipe.seed, 11 if noise else 12, step).integers(2**31))
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
    path, fields = work / "latents.safetensors", deciding(recipe, TABLE_FIELDS)
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
        metadata = {"recipe": json.dumps(fields)}
        save_file({"latents": table, "mean": mean, "std": std}, scratch, metadata=metadata)
        scratch.replace(path)
    check_recipe(path, fields)
    stored = load_file(path)
    return stored["latents"], float(stored["mean"]), 1 / float(stored["std"])


def _train_scenes(recipe: Recipe, start: int, count: int) -> list[world.Scene]:
    """Scenes of the table, in blocks of 100 with a seed each, so that any block can be drawn again."""
    return world.sample(count, recipe.seed * 1_000_000 + start, "train")


def make_average(model: nn.Module, recipe: Recipe) -> torch.optim.swa_utils.AveragedModel:
    """The exponential average of the weights, which is what ships."""
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)


def training_scenes(recipe: Recipe) -> list[world.Scene]:
    """The scenes of the table of latents, in its order."""
    scenes: list[world.Scene] = []
    for begin in tqdm(range(0, recipe.num_latents, 100), desc="captions"):
        scenes += _train_scenes(recipe, begin, 100)
    return scenes


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int = MAX_TOKENS
) -> torch.Tensor:
    """Ids `[n, length]`, padded."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    return ids


def draw_sigma(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Noise levels, float32 `[count]`: half uniform, half logit-normal."""
    uniform, normal = rng.random(count), 1 / (1 + np.exp(-rng.normal(0.3, 1.0, count)))
    mixed = np.where(rng.random(count) < 0.5, uniform, normal).astype(np.float32)
    return torch.from_numpy(mixed)


def draw_noise(like: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Standard normal noise of a tensor's shape, on its device."""
    source = torch.Generator(like.device).manual_seed(int(rng.integers(2**31)))
    return torch.randn(like.shape, generator=source, device=like.device)


def weighted_error(
    velocity: torch.Tensor, target: torch.Tensor, scenes: list[world.Scene], recipe: Recipe
) -> torch.Tensor:
    """Mean squared error with `object_weight` on and beside objects. velocity, target: `[n, C, side, side]`."""
    near = near_objects(scenes, target.shape[-1]).to(target.device)
    weight = 1 + (recipe.object_weight - 1) * near[:, None]
    loss: torch.Tensor = (weight / weight.mean() * (velocity.float() - target).square()).mean()
    return loss


def near_objects(scenes: list[world.Scene], side: int) -> torch.Tensor:
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
