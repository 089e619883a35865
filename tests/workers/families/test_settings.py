"""What a config.json leaves out means here what it means to transformers."""

import pytest
import transformers

from workers.families import FAMILIES, Settings

CONFIGS = {
    "deepseek_v3": transformers.DeepseekV3Config,
    "mixtral": transformers.MixtralConfig,
    "olmoe": transformers.OlmoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_setting_that_is_left_out_is_that_of_transformers_or_refused(name: str) -> None:
    values = CONFIGS[name]().to_dict()
    read_config = FAMILIES[name].read_config
    whole = read_config(Settings(values, "config.json"))
    refused = []
    for key in values:
        try:
            cut = read_config(
                Settings({other: value for other, value in values.items() if other != key}, "config.json")
            )
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


def test_a_window_as_long_as_the_model_is_no_window() -> None:
    values = transformers.MixtralConfig(max_position_embeddings=4096).to_dict()
    read_config = FAMILIES["mixtral"].read_config
    wide = read_config(Settings(values | {"sliding_window": 4096}, "config.json"))
    assert wide == read_config(Settings(values, "config.json"))
    with pytest.raises(ValueError, match=r"sliding_window is 4095, and only null or at least max_position_embeddings"):
        read_config(Settings(values | {"sliding_window": 4095}, "config.json"))
