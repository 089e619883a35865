"""What a config.json leaves out means here what it means to transformers."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save

from dispatch.errors import InvalidValue
from runtime.commands.command import run_command
from runtime.settings.size import model_size
from tests.workers.model.families.hugging_face import make_model
from workers.model.families import FAMILIES, Settings
from workers.model.hugging_face.source import open_source
from workers.model.model_config import ModelConfig
from workers.training.optimizer import OptimConfig

# Where the defaults of transformers are not those of a model: half of 42 dimensions is odd, and null are no experts.
OWN = {
    "glm4_moe": {"head_dim": 128},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
}


def whole_config(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose language model has these settings."""
    return {"text_config": values, "tie_word_embeddings": False} if name == "kimi_k25" else values


@pytest.mark.parametrize("name", FAMILIES)
def test_a_setting_that_is_left_out_is_that_of_transformers_or_refused(name: str) -> None:
    of_text = "deepseek_v3" if name in ("kimi_k2", "kimi_k25") else name
    values = transformers.CONFIG_MAPPING[of_text](**OWN.get(name, {})).to_dict()

    def read_config(values: dict[str, Any]) -> ModelConfig:
        return FAMILIES[name].read_config(Settings(whole_config(name, values), "config.json"))

    whole = read_config(values)
    refused = []
    for key in values:
        try:
            cut = read_config({other: value for other, value in values.items() if other != key})
        except ValueError as error:
            assert key in str(error) and "is missing" in str(error), error
            refused.append(key)
            continue
        assert cut == whole, key
    assert "vocab_size" in refused and "rms_norm_eps" not in refused  # the loop does take keys away


def test_null_is_what_transformers_makes_of_it() -> None:
    values = transformers.DeepseekV3Config().to_dict() | {"q_lora_rank": None, "norm_topk_prob": None}
    config = FAMILIES["deepseek_v3"].read_config(Settings(values, "config.json"))
    assert config.latent.query_rank == 0 and not config.moe.normalize_weights
    values = transformers.MixtralConfig().to_dict() | {"num_key_value_heads": None}
    assert FAMILIES["mixtral"].read_config(Settings(values, "config.json")).num_kv_heads == 32
    with pytest.raises(ValueError, match=r"config\.json: n_group is null"):
        FAMILIES["deepseek_v3"].read_config(
            Settings(transformers.DeepseekV3Config().to_dict() | {"n_group": None}, "config.json")
        )


def test_kimi_k2_is_deepseek_v3_under_another_name() -> None:
    assert replace(FAMILIES["kimi_k2"], model_type="deepseek_v3") == FAMILIES["deepseek_v3"]


def test_kimi_k25_is_kimi_k2_in_another_model() -> None:
    read_config, text = FAMILIES["kimi_k25"].read_config, transformers.DeepseekV3Config().to_dict()
    alone = FAMILIES["kimi_k2"].read_config(Settings(text, "config.json"))
    # Its config.json says kimi_k2 inside, and outside whether embeddings are tied, which by default they are.
    values: dict[str, Any] = {"text_config": text | {"model_type": "kimi_k2", "tie_word_embeddings": True}}
    assert read_config(Settings(values | {"tie_word_embeddings": False}, "config.json")) == alone
    assert read_config(Settings(values, "config.json")) == replace(alone, tie_embeddings=True)
    assert transformers.CONFIG_MAPPING["kimi_k25"]().tie_word_embeddings
    with pytest.raises(ValueError, match=r"config.json: text_config is missing"):
        read_config(Settings({}, "config.json"))
    with pytest.raises(ValueError, match=r"config.json: text_config is 7; it must hold names and values"):
        read_config(Settings({"text_config": 7}, "config.json"))
    with pytest.raises(ValueError, match=r"config.json: text_config: model_type is 'llama', and only 'deepseek_v3' or"):
        read_config(Settings({"text_config": text | {"model_type": "llama"}}, "config.json"))


def test_gpt_oss_reads_what_the_hub_says() -> None:
    hub = {
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    config = FAMILIES["gpt_oss"].read_config(Settings(hub, "config.json"))
    assert [config.has_window(index) for index in range(4)] == [True, False, True, False]
    assert (config.sliding_window, config.moe.top_k, config.moe.swiglu_limit, config.moe.swiglu_alpha) == (
        128,
        4,
        7,
        1.702,
    )
    assert (config.qkv_bias, config.out_bias, config.attention_sinks, config.moe.gate_bias) == (True,) * 4
    assert not config.yarn.truncate
    # 20.9 billion, of which each token uses 3.6, by the authors' count.
    size = model_size(config, OptimConfig())
    assert round(size.total / 1e9, 1) == 20.9
    assert 3.6e9 < size.active < 4.3e9  # with the embedding, which they leave out
    values = {key: value for key, value in hub.items() if not key.startswith("rope")}
    with pytest.raises(ValueError, match="rope_parameters is missing"):
        FAMILIES["gpt_oss"].read_config(Settings(values, "config.json"))


def test_a_window_as_long_as_the_model_is_no_window() -> None:
    values = transformers.MixtralConfig(max_position_embeddings=4096).to_dict()
    read_config = FAMILIES["mixtral"].read_config
    wide = read_config(Settings(values | {"sliding_window": 4096}, "config.json"))
    assert wide == read_config(Settings(values, "config.json"))
    assert replace(read_config(Settings(values | {"sliding_window": 4095}, "config.json")), sliding_window=0) == wide


def test_rotary_settings_for_some_layers_and_numbers_for_flags_are_refused() -> None:
    values = transformers.MixtralConfig().to_dict()
    read_config = FAMILIES["mixtral"].read_config
    by_kind = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="settings for 'full_attention'; only one for all layers"):
        read_config(Settings(values | {"rope_parameters": by_kind}, "config.json"))
    Settings({"scale": 1, "flag": False}, "").expect("scale", 1.0)
    with pytest.raises(ValueError, match="flag is 0, and only False"):
        Settings({"flag": 0}, "").expect("flag", False)


def test_windows_that_do_not_return_regularly_are_refused() -> None:
    values = transformers.CONFIG_MAPPING["exaone_moe"](num_hidden_layers=5, sliding_window_pattern=2).to_dict()
    read_config = FAMILIES["exaone_moe"].read_config
    assert [read_config(Settings(values, "config.json")).has_window(index) for index in range(5)] == [1, 0, 1, 0, 1]
    full, window = "full_attention", "sliding_attention"
    for kinds in ([window, full, full, full, window], [window, full], ["chunked"], 7):
        with pytest.raises(ValueError, match="layer_types is"):
            read_config(Settings(values | {"layer_types": kinds}, "config.json"))
    all_full = read_config(Settings(values | {"layer_types": [full] * 5}, "config.json"))
    assert not all_full.sliding_window


# They read the same settings by the same functions; kimi_k2 is deepseek_v3.
SLOWER = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(FAMILIES.keys() - {"deepseek_v3", "kimi_k2", "mixtral", "qwen3_moe"})
]
ABSURD: tuple[object, ...] = (10**18, 10**400, 1e300, -1, 1.5, True, "8", [8], {}, None, [])
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "max_position_embeddings")
OTHERS: dict[str, tuple[object, ...]] = {
    "num_hidden_layers": (*ABSURD, 10**9),
    "rms_norm_eps": (10**400, 1e300, "x", [1], True, -1),
    "architectures": (1.5, True, {"a": 1}),
    "rope_parameters": (7, "x", *({"rope_type": "default", "rope_theta": bad} for bad in ("x", [1], 10**400, -1))),
}


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "qwen3_moe", *SLOWER])
def test_an_absurd_value_is_refused_at_once_by_import_and_plan(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"model.norm.weight": torch.zeros(2)}))
    file = tmp_path / "config.json"
    whole = make_model(name, torch.float32).config.to_dict() | {"architectures": [FAMILIES[name].architecture]}
    good = whole.get("text_config", whole)
    experts = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
    sizes = (
        *SIZES,
        *(next(key for key in keys if key in good) for keys in (experts, ("moe_k", "num_experts_per_tok"))),
    )
    if name == "solar_open":  # it has no dense layers, whose width this is
        sizes = tuple(key for key in sizes if key != "intermediate_size")
    special = {"deepseek_v3": {"n_group": (0, 10**18)}, "qwen3_moe": {"mlp_only_layers": (1, [1], ["a", 0], [[]])}}
    special["glm4_moe_lite"] = {"mlp_layer_types": (1, [1], ["dense"], [["dense"]], ["sparse", "dense", "sparse"])}

    def import_and_plan(**changes: object) -> list[str]:
        outer = {key: changes.pop(key) for key in ("architectures",) if key in changes}
        text = {"text_config": good | changes} if "text_config" in whole else changes
        file.write_text(json.dumps(whole | outer | text))
        plan = ("runtime.commands.plan.command", "trimtab plan", [str(file), "--world=2"])
        return [_refusal(open_source, tmp_path), _refusal(run_command, *plan)]

    assert [error.split()[-2:] for error in import_and_plan()] == [["directory", "again"], []]  # it lacks the tensors
    begun = time.process_time()
    for key, values in (dict.fromkeys(sizes, ABSURD) | OTHERS | special.get(name, {})).items():
        for value in values:
            imported, planned = import_and_plan(**{key: value})
            assert imported == planned != "", (key, value)
    assert "quantization_config is [1]" in import_and_plan(quantization_config=[1])[0]
    assert time.process_time() - begun < 20  # for some 200 refusals


def _refusal(use: Callable[..., object], *arguments: object) -> str:
    try:
        use(*arguments)
    except InvalidValue as error:
        return str(error)
    return ""
