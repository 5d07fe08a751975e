# SPDX-License-Identifier: Apache-2.0
"""Tiny text encoders of every family, with random weights, and the tokenizers that their pipelines ask for."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rapid3rt.tiny import load_tiny, parts
from rapid3rt.tiny.flux import make_t5

Parts = dict[str, Any]
LAYERS = (1, 2)  # whose states the pipelines of FLUX.2 join, if they are told so
# Pipelines of FLUX.2 dev give the content of a message as a list, those of Klein as text.
CHAT = (
    "{% for m in messages if m.role == 'user' %}"
    "{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
)


@cache
def encoders(kind: str) -> tuple[Parts, Parts]:
    """The components of a pipeline that read prompts, and the sizes they ask of a transformer."""
    torch.manual_seed(2)
    if kind in ("sd3", "sd35"):
        tiny = load_tiny("sd3")
        names = [n for n in tiny.components if n.startswith(("text_encoder", "tokenizer"))]
        config = tiny.transformer.config
        sizes = {n: config[n] for n in ("joint_attention_dim", "pooled_projection_dim")}
        return {n: getattr(tiny, n) for n in names}, sizes
    if kind in ("dev", "schnell"):
        tokenizer = parts.make_tokenizer()
        given = {
            "text_encoder": CLIPTextModel(parts.make_clip_config(len(tokenizer))).eval(),
            "tokenizer": tokenizer,
            "text_encoder_2": make_t5(len(tokenizer)).eval(),
            "tokenizer_2": tokenizer,
        }
        return given, {"joint_attention_dim": 128, "pooled_projection_dim": 64}
    tokenizer = _chat_tokenizer()
    make = {"flux2": _mistral, "klein": _qwen3, "qwen": _qwen_vl}[kind]
    return {"text_encoder": make(len(tokenizer)).eval(), "tokenizer": tokenizer}, {}


def _chat_tokenizer() -> Any:
    """The tiny world's, with a chat template.

    It splits at punctuation: Qwen-Image cuts the first 34 tokens of its own template off, so there must be as many.
    """
    tokenizer = parts.make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def _sizes(vocabulary: int, width: int) -> Parts:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2}
    layers = {"num_hidden_layers": 2, "hidden_size": width, "intermediate_size": 32}
    return {**heads, **layers, "vocab_size": vocabulary}


def _mistral(vocabulary: int) -> Any:
    text = {"model_type": "mistral", **_sizes(vocabulary, 16)}
    seeing = {"model_type": "pixtral", **_sizes(vocabulary, 16), "image_size": 32}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=seeing))


def _qwen3(vocabulary: int) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**_sizes(vocabulary, 16)))


def _qwen_vl(vocabulary: int) -> Any:
    axes = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**_sizes(vocabulary, 32), "rope_parameters": {**axes, "rope_theta": 1e6}}
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**seeing, "out_hidden_size": 32})
    return Qwen2_5_VLForConditionalGeneration(config)
