"""Settings: presets, files, overrides, the rules between sections, and what may change on resume."""

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from dispatch.laws import BalanceConfig
from runtime.commands.inference import config_for
from runtime.job.job import _idle_gpus
from runtime.job.launch import balance_of
from runtime.runs.run_dir import CONFIG_FILE, find_run, new_run_dir, place_of_run
from runtime.settings import config_file
from runtime.settings.config import RunConfig, TrainConfig, check_resume, cross_check, flatten
from runtime.settings.config_file import (
    config_from_yaml,
    config_from_yaml_file,
    config_to_yaml,
    load_config,
    override,
    parse_train,
)
from runtime.settings.size import recorded_scores_bytes
from workers.distributed.parallel import ParallelConfig
from workers.model.freezing import NAMES
from workers.model.model_config import GROUPED_QUERY_ONLY

PRESETS = ("tiny", "small", "compare", "paper-1b")


def with_settings(**overrides: Any) -> TrainConfig:
    """TrainConfig with settings by dotted name, "__" for the dot: with_settings(run__steps=3)."""
    base = TrainConfig()
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, name = key.split("__", 1)
        sections.setdefault(section, {})[name] = value
    model = sections.get("model", {})
    moe = {name.removeprefix("moe__"): model.pop(name) for name in list(model) if name.startswith("moe__")}
    if moe:
        model["moe"] = dataclasses.replace(base.model.moe, **moe)
    parts = {name: dataclasses.replace(getattr(base, name), **values) for name, values in sections.items()}
    return dataclasses.replace(base, **parts)


# Presets


@pytest.mark.parametrize("name", ["tiny", "small", "compare"])
def test_preset_passes_all_checks(name: str) -> None:
    cross_check(load_config(name))


def test_paper_preset_passes_all_checks_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = load_config("paper-1b")
    cross_check(config)
    # Table 5: 1152 x 2048 tokens a step, 40k steps are close to 100B tokens.
    tokens = config.run.steps * config.run.global_batch_size * config.model.max_seq_len
    assert tokens == pytest.approx(100e9, rel=0.1)
    assert config.model.num_layers - config.model.num_dense_layers == 9


def test_file_keeps_the_small_presets_value_where_it_says_nothing(tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  moe:\n    top_k: 2\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    small = load_config("small")
    assert config.model.moe.top_k == 2
    assert config.balance == small.balance
    assert dataclasses.replace(config.model.moe, top_k=small.model.moe.top_k) == small.model.moe


def test_file_named_like_a_preset_does_not_hide_the_preset(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").write_text("not a configuration")
    monkeypatch.chdir(tmp_path)
    assert load_config("small").run.steps > 0


# Text


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip_is_exact(name: str) -> None:
    config = load_config(name)
    assert config_from_yaml(config_to_yaml(config)) == config


# Texts that YAML or the parser could take for numbers, dates, booleans, null, comments, lists or sections.
ODD_TEXTS = (
    "1e3",
    "12",
    "no",
    "null",
    "~",
    "#x",
    "2026-01-01",
    "0x1f",
    "[a]",
    "{a: b}",
    "- a",
    " x ",
    "'q'",
    "a\nb",
    "ü",
)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_yaml_round_trip_keeps_texts_and_floats(text: str) -> None:
    config = with_settings(data__path=(text, "b"), data__tokenizer=text, data__cache_dir=text, optim__lr=0.1 + 0.2)
    assert config_from_yaml(config_to_yaml(config)) == config


def test_numbers_may_be_written_as_people_write_them() -> None:
    assert config_from_yaml("optim:\n  lr: 1e-3\n").optim.lr == 1e-3  # YAML 1.1 takes 1e-3 for a string


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  hiden: 3\n", "unknown setting model.hiden; did you mean model.hidden?"),
        ("model:\n  moe: {topk: 3}\n", "unknown setting model.moe.topk; did you mean model.moe.top_k?"),
        ("modell: {hidden: 3}\n", "unknown setting modell; did you mean model?"),
        ("model:\n  hidden: abc\n", "model.hidden is 'abc'; it must be a whole number"),
        ("model:\n  hidden: 1.5\n", "model.hidden is '1.5'; it must be a whole number"),
        ("model:\n  hidden:\n", "model.hidden is empty (null); give a value"),
        ("model:\n  moe: {score: tanh}\n", "model.moe.score is 'tanh'; it must be sigmoid or softmax"),
        ("model: 3\n", "model is a section: it must hold settings below it, not 3"),
        ("- model\n", "must hold sections such as 'model:'"),
        ("", "must hold sections such as 'model:'"),
        ("model: {\n", "not valid YAML"),
        ("optim: {lr: .inf}\n", "lr (inf) must be above 0 and finite"),
        ("model: {moe: {top_k: 40}}\n", "top_k (40) must be between 1 and num_experts (16)"),
    ],
)
def test_wrong_file_is_refused_with_value_place_and_way_out(text: str, message: str, tmp_path: Any) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_unreadable_file_is_refused(tmp_path: Any) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.yaml is not text"):
        load_config(str(binary))
    with pytest.raises(ValueError, match="--config tinny: there is no such file or preset; did you mean tiny"):
        load_config("tinny")
    with pytest.raises(ValueError, match="give a YAML file or a preset: compare, paper-1b, small, tiny"):
        load_config(str(tmp_path))


# Options of `trimtab train`


def test_options_override_the_file_and_short_forms_work() -> None:
    request = parse_train(["--config", "tiny", "--model.moe.top_k", "3", "--steps=7", "--name", "a", "--device", "cpu"])
    assert (request.config.model.moe.top_k, request.config.run.steps) == (3, 7)
    assert (request.config.run.name, request.config.cluster.device) == ("a", "cpu")
    assert request.config.optim == load_config("tiny").optim
    assert (request.resume, request.step) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.hiden", "3"], "unknown option --model.hiden; did you mean --model.hidden?"),
        (["--hidden", "3"], "unknown option --hidden; did you mean --model.hidden?"),
        (["--stpes", "3"], "unknown option --stpes; did you mean --steps?"),
        (["--reusme", "first"], "unknown option --reusme; did you mean --resume?"),
        (["--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
        (["--runs-dir", "all"], "unknown option --runs-dir; did you mean --run.dir?"),
        (["--xyz"], "unknown option --xyz; see `trimtab train --help`"),
        (["--conf", "tiny"], "unknown option --conf"),
        (["--steps", "many"], "run.steps is 'many'; it must be a whole number"),
        (["--model", "3"], "--model is a section"),
        (["--optim.lr"], "--optim.lr: expected one argument"),
        (["extra"], "unrecognized arguments: extra"),
        (["--step", "3"], "--step (3) chooses a checkpoint of --resume RUN or --init RUN, which is missing"),
        (["--resume", "x", "--config", "tiny"], "--config cannot be given with it"),
        (["--resume", "no-such-run"], "there is no run 'no-such-run'"),
        (["--resume", "no-such-run", "--run.dir"], "there is no run 'no-such-run'"),
        (["--steps", "m" * 1000], f"run.steps is '{'m' * 59}; it must be a whole number"),
    ],
)
def test_wrong_option_is_refused_with_way_out(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_train(arguments)
    assert message in str(caught.value)


# A value for each setting whose neighbour of the default would break a rule of its section.
CHOSEN: dict[str, Any] = {
    "run.log_to": ("tensorboard", "mlflow"),
    "run.sample_temperature": 0.7,
    "run.sample_prompts": ("Once upon a time,", "", "\u4f60 {'a': \"b\"}"),
    "run.global_batch_size": 12, "run.micro_batch_size": 2, "cluster.num_workers": 3, "cluster.max_workers": 4,
    "parallel.ep_size": 3,
    "model.hidden": 48, "model.num_heads": 4, "model.num_kv_heads": 4,
    "model.moe.num_experts": 12, "model.moe.num_groups": 3, "model.moe.scores_per_group": 1,
    "model.head_dim": 8, "model.clip_qkv": 2.0, "model.yarn.factor": 4.0,
    "model.latent.kv_rank": 20, "model.latent.nope_dim": 12, "model.latent.rope_dim": 8,
    "balance.law": "smebu", "balance.options": {"beta": 0.9}, "balance.module": "dispatch.laws",
    "balance.rate": 0.01, "balance.zero_last": 0.5, "aux.z_alpha": 1e-3,
    "cluster.device": "cuda", "cluster.gpus_per_worker": 2.0,
    "data.path": ("a.txt", "b"), "data.suffixes": (".md",),
    "optim.freeze": ("router", "norms"), "model.lora.targets": ("dense_ffn",), "model.moe.swiglu_limit": 7.0,
    "optim.name": "sgd", "optim.options": {"momentum": 0.8}, "optim.module": "examples.my_optimizer",
    "parallel.exchange": "rank", "parallel.module": "dispatch.exchange.all_to_all",
    "data.mix": (0.5, 0.5), "data.mix_after": (0.25, 0.75), "data.shift_at": 3,
}  # fmt: skip


def another_value(key: str, hint: Any, default: Any) -> Any:
    if key in CHOSEN:
        return CHOSEN[key]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2
    choices = [choice for choice in get_args(hint) if choice not in (default, type(None), str)]
    return choices[0] if choices else "other"


def test_every_setting_reaches_the_effective_configuration(monkeypatch: pytest.MonkeyPatch) -> None:  # B34
    monkeypatch.setattr(config_file, "cross_check", lambda _: None)  # the values contradict each other
    hints = {key: hint_of(key) for key in flatten(TrainConfig())}
    base = flatten(load_config("small"))
    others = {key: another_value(key, hint, base[key]) for key, hint in hints.items()}
    assert not [key for key in others if others[key] == base[key]]
    # They exclude the latent attention, or the sharding, of the others.
    grouped_query_only = [f"model.{name}" for name in GROUPED_QUERY_ONLY]
    names = (*grouped_query_only, "model.sliding_window", "parallel.expert_copies")
    alone = {name: others.pop(name) for name in names}
    for changed in (others, alone):
        arguments = [part for key, value in changed.items() for part in (f"--{key}", as_option(value))]
        config = parse_train(arguments).config
        assert flatten(config) == base | changed
        assert flatten(config_from_yaml(config_to_yaml(config))) == base | changed


def hint_of(key: str) -> Any:
    hint: Any = TrainConfig
    for name in key.split("."):
        hint = get_type_hints(hint)[name]
    return hint


def as_option(value: Any) -> str:
    return yaml.safe_dump(list(value), default_flow_style=True).strip() if isinstance(value, tuple) else str(value)


# Rules between sections


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cluster__num_workers": 3}, r"run.global_batch_size \(16\) must be a multiple of .* \(3\).*; 18 would do"),
        ({"run__micro_batch_size": 3}, r"run.micro_batch_size \(3\) must divide .* \(8 = .*use one of \[1, 2, 4, 8\]"),
        ({"cluster__num_workers": 4, "parallel__ep_size": 3}, r"parallel.ep_size \(3\) must divide .* \(4\)"),
        ({"model__moe__num_experts": 1, "model__moe__top_k": 1}, r"ep_size \(2\) must be .* num_experts \(1\)"),
        ({"optim__freeze": NAMES}, r"optim.freeze \(embedding, .*\) leaves nothing to train; name fewer parts"),
        ({"model__num_dense_layers": 4}, r"model.num_dense_layers \(4\) equals model.num_layers"),
        ({"model__attention": "latent", "model__clip_qkv": 2.0}, r"clip_qkv \(2.0\) has no effect on latent attention"),
        (
            {"model__vocab_size": 200},
            r"model.vocab_size \(200\) is smaller .* \(257\); set --model.vocab_size 257",
        ),
        (
            {"parallel__exchange": "deep_ep", "parallel__payload": "fp8"},
            "payload 'fp8' is not for exchange 'deep_ep', which sends bf16 rows; take 'compute'",
        ),
        (
            {"parallel__exchange": "deep_ep", "cluster__device": "cpu"},
            r"deep_ep' .* cluster.device is cpu and run.dtype float32; set --device cuda --run.dtype bfloat16",
        ),
        (
            {"parallel__exchange": "deep_ep", "run__dtype": "bfloat16", "model__moe__top_k": 33}
            | {"model__moe__num_experts": 33},
            r"num_experts \(33\) must be a multiple of ep_size \(2\); top_k \(33\) must be at most 32",
        ),
        (
            {"parallel__exchange": "deep_ep", "run__dtype": "bfloat16"},
            "exchange 'deep_ep' needs .*the package deep_ep .*github.com/deepseek-ai/DeepEP",
        ),
        (
            {"cluster__collective_timeout_s": 6.0, "cluster__coordinator_timeout_s": 3.0},
            r"collective_timeout_s \(6\) must be more than twice .*\(3\).*--cluster.collective_timeout_s 9",
        ),
        (
            {"balance__law": "quantile", "model__moe__num_experts": 256, "model__num_layers": 62},
            r"balance.law quantile counts 1001 numbers for each of 256 experts in .* MiB a step .*of at most 40; use",
        ),
        (
            {"cluster__num_workers": 4, "parallel__context": 2, "run__global_batch_size": 15},
            r"global_batch_size \(15\) must be a multiple of .* / parallel.context \(4 / 2\).*; 16 would do",
        ),
        (
            {"cluster__num_workers": 16, "parallel__context": 16, "parallel__ep_size": 2, "model__max_seq_len": 45},
            r"parallel.context \(16\) leaves a rank without tokens of .*max_seq_len \(45\); lower it",
        ),
        (
            {"parallel__context": 2, "aux__loss": "sequence", "aux__alpha": 0.01},
            r"aux.loss 'sequence' needs whole sequences .*parallel.context \(2\).*; take --aux.loss global_batch",
        ),
        (
            {"parallel__context": 2, "balance__record": 1, "model__max_seq_len": 45},
            r"balance.record needs .*max_seq_len \(45\) must be a multiple of parallel.context \(2\)",
        ),
        (
            {"parallel__exchange": "node", "cluster__num_workers": 4},
            r"parallel.exchange node needs .* several nodes .*but here is 1 node; take .*exchange auto, .* or say",
        ),
        (
            {
                "parallel__exchange": "node",
                "cluster__num_workers": 4,
                "cluster__min_workers": 2,
                "cluster__address": "auto",
            },
            r"parallel.exchange node needs .* cluster.min_workers \(2\) may .*; take --parallel.exchange auto",
        ),
        ({"data__tokenizer": "/no/such/file.json"}, r"data.tokenizer /no/such/file.json cannot be read"),
    ],
)
def test_contradiction_between_sections_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_check(with_settings(**overrides))


@pytest.mark.parametrize(
    "changes", [{"cluster__address": "auto"}, {"parallel__ranks_per_node": 2}, {"parallel__ep_size": 1}]
)
def test_an_exchange_between_nodes_is_taken_where_there_may_be_some_or_nothing_travels(changes: dict[str, Any]) -> None:
    cross_check(with_settings(parallel__exchange="node", cluster__num_workers=4, **changes))


@pytest.mark.parametrize(("num_experts", "num_workers"), [(8, 3), (5, 5)])
def test_experts_need_not_divide_evenly(num_experts: int, num_workers: int) -> None:
    batch = 4 * num_workers
    cross_check(
        with_settings(
            model__moe__num_experts=num_experts, cluster__num_workers=num_workers, run__global_batch_size=batch
        )
    )


def test_more_workers_on_cuda_than_gpus_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidValue, match=r"2 workers need 1 GPU each, but this machine has 1; set --workers 1"):
        cross_check(with_settings(cluster__device="cuda"))
    cross_check(with_settings(cluster__device="cuda", cluster__gpus_per_worker=0.5))
    cross_check(with_settings(cluster__device="cuda", cluster__min_workers=1))  # two are tried, then one


@pytest.mark.parametrize(
    ("gpus", "arguments", "num_workers", "dtype"),
    [
        (0, [], 2, "float32"),
        (1, [], 1, "bfloat16"),
        (3, [], 2, "bfloat16"),  # a batch of 16 sequences cannot be divided by 3
        (6, ["--parallel.context", "4"], 4, "bfloat16"),
        (6, ["--parallel.ep_size", "4"], 4, "bfloat16"),
        (4, ["--workers", "2", "--run.dtype=float32"], 2, "float32"),
        (1, ["--workers", "2"], 2, "float32"),  # not enough of them: on CPUs
        (4, ["--device", "cpu"], 2, "float32"),
        (4, ["--cluster.address", "auto"], 2, "float32"),
    ],
)
def test_a_preset_takes_the_gpus_of_the_machine_and_bf16(
    gpus: int, arguments: list[str], num_workers: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = parse_train(arguments).config
    assert (config.cluster.num_workers, config.run.dtype) == (num_workers, dtype)


def test_gpus_that_are_left_idle_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (
        "device cpu, because auto takes a GPU for each of 2 workers and this machine has 1; --workers 1"
        in _idle_gpus(ClusterConfig(num_workers=2))
    )
    for quiet in ({"num_workers": 1}, {"device": "cpu"}, {"address": "auto"}):
        assert not _idle_gpus(ClusterConfig(**quiet)), quiet


def test_cuda_is_refused_on_a_machine_without_it_but_not_on_a_joined_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device on this machine; use --device cpu"):
        cross_check(with_settings(cluster__device="cuda"))
    cross_check(TrainConfig(cluster=ClusterConfig(device="cuda", address="10.0.0.1:6379")))


def test_deep_ep_is_not_asked_for_where_nothing_travels_nor_here_on_a_joined_cluster() -> None:
    cross_check(with_settings(parallel__exchange="deep_ep", cluster__num_workers=1, cluster__device="cpu"))
    joined = {"cluster__address": "10.0.0.1:6379", "cluster__device": "cuda", "run__dtype": "bfloat16"}
    cross_check(with_settings(parallel__exchange="deep_ep", **joined))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"run.steps \(0\) must be at least 1"),
        ({"eval_every": -1}, r"run.eval_every \(-1\) must be 0 or more"),
        ({"dtype": "float16"}, "run.dtype is 'float16'"),
        ({"name": "a/b"}, "run.name 'a/b' must be a plain directory name"),
        ({"name": ".."}, "run.name '..' must be a plain directory name"),
        ({"name": ""}, "run.name '' must be a plain directory name"),
        ({"name": "-x"}, "run.name '-x' must be a plain directory name"),
        ({"name": "a\nb"}, r"run.name 'a\\nb' must be a plain directory name, without a slash, a control character"),
        ({"log_to": ("wandb", "comet")}, r"run.log_to names 'comet'; it can name tensorboard, wandb, mlflow"),
        ({"log_to": ("wandb", "wandb")}, r"run.log_to \(wandb, wandb\) names one twice"),
        ({"sample_prompts": ("a",) * 17}, "run.sample_prompts has 17 prompts; it can have 16 at most"),
        ({"sample_prompts": ("", "b" * 501)}, "prompt 2 of run.sample_prompts has 501 characters; it can have 500"),
        ({"sample_prompts": ("\udce4",)}, "prompt 1 of run.sample_prompts is not UTF-8"),
        ({"sample_tokens": 0}, r"run.sample_tokens \(0\) must be 1 to 512"),
        ({"sample_temperature": -0.1}, r"run.sample_temperature \(-0.1\) must be 0 to 100"),
        ({"full_disk_wait_s": float("nan")}, r"run.full_disk_wait_s \(nan\) must be 0 or more"),
        ({"sample_temperature": float("nan")}, r"run.sample_temperature \(nan\) must be 0 to 100"),
        ({"sample_tokens": 513}, r"run.sample_tokens \(513\) must be 1 to 512"),
        ({"on_bias_mismatch": "ignore"}, r"run.on_bias_mismatch is 'ignore'; it must be stop or repair"),
    ],
)
def test_run_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)


def test_micro_batches_of_a_rank_fill_its_share() -> None:
    run = RunConfig(global_batch_size=24, micro_batch_size=3)
    assert [run.num_micro_batches(world_size) for world_size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert RunConfig(global_batch_size=24).num_micro_batches(2) == 1


# Run directories and resume


def test_the_exchange_of_a_run_is_not_kept_on_other_ranks_or_devices(tmp_path: Path) -> None:
    nodes = {"parallel__exchange": "node", "parallel__ranks_per_node": 2, "cluster__num_workers": 4}
    (tmp_path / CONFIG_FILE).write_text(config_to_yaml(with_settings(**nodes)))
    for workers, chosen in ((None, 1), (2, 2)):
        config = config_for(tmp_path, workers, "cpu")
        assert (config.cluster.num_workers, config.parallel.exchange, config.parallel.ranks_per_node) == (
            chosen,
            "auto",
            0,
        )


def test_a_run_of_any_layout_is_evaluated_on_any_number_of_ranks(tmp_path: Path) -> None:
    trained = with_settings(cluster__num_workers=4, run__global_batch_size=12, balance__record=10)
    for parallel in (
        ParallelConfig(context=4, ep_size=2),
        ParallelConfig(context=2, shard="full", replicate=2, ep_size=1),
        ParallelConfig(expert_copies=1),
    ):
        config = dataclasses.replace(trained, parallel=parallel)
        cross_check(config)
        (tmp_path / CONFIG_FILE).write_text(config_to_yaml(config))
        for workers, num_ranks in ((None, 1), (2, 2), (3, 3), (4, 4)):
            found = config_for(tmp_path, workers, "cpu").parallel
            assert found.context == max(size for size in range(1, parallel.context + 1) if num_ranks % size == 0)
            assert (found.shard, found.expert_copies) == (parallel.shard, 0)


def test_resume_takes_the_settings_of_the_run_and_lets_some_change(tmp_path: Any) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "config.yaml").write_text(config_to_yaml(load_config("tiny")))
    request = parse_train(["--resume", str(run), "--step", "5", "--steps", "40", "--parallel.ep_size", "1"])
    assert (request.resume, request.step) == (run, 5)
    assert (request.config.run.steps, request.config.parallel.ep_size) == (40, 1)
    assert request.config.model == load_config("tiny").model
    with pytest.raises(ValueError, match=r"must keep model.hidden \(was 32, now 64\).*start a new run"):
        parse_train(["--resume", str(run), "--model.hidden", "64"])


def test_a_new_run_takes_model_and_settings_of_another_one_and_a_gentle_rate(tmp_path: Any) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "config.yaml").write_text(config_to_yaml(load_config("tiny")))
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    adapters = parse_train(["--config", "tiny", "--model.lora.rank", "2"]).config
    (adapted / "config.yaml").write_text(config_to_yaml(adapters))
    with pytest.raises(ValueError, match=r"has adapters \(model.lora.rank 2\).*merge them with `trimtab export"):
        parse_train(["--init", str(adapted)])
    request = parse_train(["--init", str(run), "--data.path", "x", "--model.recompute", "full", "--name", "b"])
    assert (request.init, request.resume, request.config.run.name) == (run, None, "b")
    assert request.config.optim.lr == 1e-5
    assert parse_train(["--init", str(run), "--optim.lr", "0.001"]).config.optim.lr == 0.001
    for more, message in (
        (
            ("--model.hidden", "64"),
            r"the settings model\.\* are those of .*; only model.max_seq_len",
        ),
        (("--resume", "b"), "--init takes the settings of its run, so --resume cannot be given too"),
        (("--config", "tiny"), "so --config cannot be given too"),
        (("--balance.law", "multiplicative"), "cannot go on with the bias of"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_train(["--init", str(run), *more])


@pytest.mark.parametrize(
    "changed",
    [
        {"run__seed": 1},
        {"data__path": ("x",)},
        {"balance__law": "none"},
        {"model__moe__top_k": 2},
        {"data__mix": (1, 2)},
        {"data__mix": (1, 2), "data__mix_after": (2, 1), "data__shift_at": 5},
    ],
)
def test_resume_refuses_what_the_checkpoint_depends_on(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a resumed run must keep"):
        check_resume(TrainConfig(), with_settings(**changed))


def test_resume_allows_what_changes_no_result() -> None:
    changed = with_settings(
        model__recompute="full", cluster__num_workers=4, run__steps=9, data__cache_dir="/x", balance__rate=1e-4
    )
    check_resume(TrainConfig(), changed)


def test_run_is_found_by_path_and_by_name(tmp_path: Any) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert find_run(str(run)) == run
    assert find_run("first", str(tmp_path / "runs")) == run
    with pytest.raises(ValueError, match=r"there is no run 'frist': .*did you mean first\?"):
        find_run("frist", str(tmp_path / "runs"))
    with pytest.raises(ValueError, match=rf"no run '{tmp_path}/gone': {tmp_path}/gone does not hold a config.yaml"):
        find_run(f"{tmp_path}/gone", str(tmp_path / "runs"))


def test_every_command_looks_for_a_name_in_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_RUNS_DIR", str(tmp_path / "shared"))
    for run in (tmp_path / "shared" / "mine", tmp_path / "elsewhere" / "mine"):
        run.mkdir(parents=True)
        (run / CONFIG_FILE).write_text(config_to_yaml(load_config("tiny")))
    assert find_run("mine") == tmp_path / "shared" / "mine"
    assert parse_train(["--resume", "mine"]).resume == tmp_path / "shared" / "mine"
    assert parse_train(["--resume", "mine", "--run.dir", "elsewhere"]).resume == Path("elsewhere/mine")
    (tmp_path / "elsewhere" / "mine").rename(tmp_path / "elsewhere" / "theirs")
    with pytest.raises(SystemExit):
        parse_train(["--resume", "theirs", "--run.dir", "elsewhere", "--help"])
    assert parse_train(["--name", "new"]).config.run.dir == str(tmp_path / "shared")
    assert parse_train(["--run.dir", "here"]).config.run.dir == "here"
    # What import makes is found by the same name, and a path stays a path.
    assert place_of_run("mine") == tmp_path / "shared" / "mine"
    assert place_of_run("./mine") == Path("mine")


def test_a_name_of_two_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("mine", "runs/mine"):
        Path(run).mkdir(parents=True)
        Path(run, CONFIG_FILE).write_text("")
    with pytest.raises(ValueError, match=r"'mine' names two runs, runs/mine and ./mine; give the path"):
        find_run("mine")
    assert find_run("./mine") == Path("mine")


def test_a_new_run_without_a_name_is_named_by_the_time(tmp_path: Any) -> None:
    assert new_run_dir(str(tmp_path), None, datetime(2026, 3, 4, 5, 6, 7)).name == "20260304-050607"


@pytest.mark.parametrize(
    ("arguments", "every"),
    [
        ([], 0),
        (["--balance.record"], 1),
        (["--balance.record", "--run.steps", "3"], 1),
        (["--balance.record", "10"], 10),
        (["--balance.record=10", "--balance.record"], 1),
        (["--balance.record", "0"], 0),
    ],
)
def test_scores_are_recorded_of_every_step_or_of_each_nth(arguments: list[str], every: int) -> None:
    assert parse_train(["--config", "tiny", *arguments]).config.balance.record == every


@pytest.mark.parametrize("value", ["-1", "0.5", "often"])
def test_a_wrong_rhythm_of_recording_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"balance\.record.*whole number"):
        parse_train(["--config", "tiny", "--balance.record", value])


def test_what_is_recorded_is_not_part_of_the_law() -> None:
    config = parse_train(["--config", "tiny", "--balance.record", "10", "--balance.schedule", "linear"]).config
    assert balance_of(config) == BalanceConfig(schedule="linear", horizon=config.run.steps)


def test_the_size_of_recorded_scores_is_known_before() -> None:
    config = parse_train(["--config", "tiny", "--balance.record", "3"]).config
    # Steps 1, 4, ... 19 of 20; 4 sequences of 64 tokens; 2 MoE layers of 8 experts; 2 bytes.
    assert recorded_scores_bytes(config) == 7 * 4 * 64 * 2 * 8 * 2
    assert recorded_scores_bytes(parse_train(["--config", "tiny"]).config) == 0


@pytest.mark.parametrize(
    "text", ['run: !!python/object/apply:os.system ["touch {ran}"]', "run: {{name: !!python/name:os.system }}"]
)
def test_a_file_with_a_tag_of_python_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    path, ran = tmp_path / "config.yaml", tmp_path / "ran"
    path.write_text(text.format(ran=ran))
    with pytest.raises(ValueError, match=r"line 1: the tag tag:yaml.org,2002:python/[^ ]* asks for a type"):
        config_from_yaml_file(path)
    with pytest.raises(ValueError, match="the tag"):
        load_config(str(path))
    assert not ran.exists()


def test_an_option_that_a_command_lacks_is_not_suggested_in_its_own_place() -> None:
    with pytest.raises(InvalidValue, match="unknown option --watch; see `trimtab train --help`"):
        override(load_config("tiny"), ["--watch"])
