"""Kimi K2 (arXiv 2507.20534): DeepSeek-V3 with 384 experts in one group, under a name of its own."""

from dataclasses import replace

from workers.model.families import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, model_type="kimi_k2")
