"""Kimi K2.5: Kimi K2 as the language model of a vision-language model, whose vision tower is kept as it is."""

from dataclasses import replace

from workers.model.families import deepseek_v3
from workers.model.families.settings import Settings
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Kimi_K25Config, which has those of the language model in text_config."""
    text = settings.inner("text_config")
    text.expect("model_type", "deepseek_v3", "kimi_k2")
    # transformers reads this one from the whole model's settings.
    tied = settings.flag("tie_word_embeddings", default=True)
    return deepseek_v3.read_config(Settings({**text.values, "tie_word_embeddings": tied}, text.where))


FAMILY = replace(
    deepseek_v3.FAMILY,
    model_type="kimi_k25",
    architecture="KimiK25ForConditionalGeneration",
    other_architectures=("Kimi_K25ForConditionalGeneration",),  # of transformers
    read_config=read_config,
    prefix="language_model.",
)
