"""`trimtab plan`: parameters of published models, what a rank needs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.cli import main
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config_file import config_to_yaml, load_config, override

ROOT = Path(__file__).parents[4]
DEEPSEEK = str(ROOT / "examples/deepseek-v3.json")


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) in (0, 1)  # 1: does not fit
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def test_deepseek_v3_has_its_published_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys, DEEPSEEK, "--world", "2048", "--ep", "64")
    # arXiv 2412.19437: 671B, of which 37B are activated; without the layer for multi-token prediction.
    assert plan["parameters"]["total"] == 671_026_404_352  # and 14,848 biases of the routers, which are no parameters
    experts = 58 * 3 * 2048 * 7168
    assert plan["parameters"]["active"] == 671_026_404_352 - (256 - 8) * experts == 37_552_282_624
    assert plan["parameters_of_rank"]["experts"] == 58 * 4 * 3 * 2048 * 7168
    assert "multi-token prediction is left out; --mtp 1" in " ".join(plan["notes"])
    assert not plan["fits"]


def test_the_layer_for_multi_token_prediction_counts_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (DEEPSEEK, "--world", "64", "--ep", "64")
    without, with_it = plan_of(capsys, *arguments), plan_of(capsys, *arguments, "--mtp", "1")
    # 11.5B by README_WEIGHTS.md of DeepSeek-V3, without the embedding and output that it shares.
    more = with_it["parameters"]["total"] - without["parameters"]["total"]
    assert more / 1e9 == pytest.approx(11.5, rel=0.02)
    forward = [plan["all_to_all_bytes"]["rank"]["forward"]["network"] for plan in (without, with_it)]
    assert forward[1] / forward[0] == pytest.approx(59 / 58)
    assert with_it["activation_bytes"]["head and loss"] > 1.9 * without["activation_bytes"]["head and loss"]


def test_state_is_sixteen_bytes_a_parameter_of_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys, "small", "--world", "4", "--ep", "2")
    held = plan["parameters_of_rank"]
    state = plan["state_bytes"]
    assert [state[name]["experts"] for name in ("weights", "gradients", "AdamW moments")] == [
        factor * held["experts"] for factor in (4, 4, 8)
    ]
    assert sum(part["dense"] for part in state.values()) == 16 * held["dense"]
    assert plan["gradient_bytes"]["dense"] == 2 * 4 * held["dense"] * 3 // 4


def test_muon_keeps_one_number_of_a_hidden_matrix_and_gathers_it_where_it_is_sharded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, sharded, adamw = (
        plan_of(capsys, "small", "--world", "4", "--ep", "2", "--optimizer", optimizer, "--shard", shard)
        for optimizer, shard in (("muon", "none"), ("muon", "optimizer"), ("adamw", "optimizer"))
    )
    hidden, width, ffn, shared, experts, layers = 192, 32, 512, 128, 16, 4
    attention = layers * ((6 + 2 * 2) * width + 6 * width) * hidden  # queries, keys and values; output
    matrices = attention + 3 * hidden * ffn + 3 * 3 * hidden * shared  # one dense layer, shared experts of the others
    others = plan["parameters_of_rank"]["dense"] - matrices
    assert others == 2 * 257 * hidden + 3 * experts * hidden + (2 * layers + 1) * hidden
    state = plan["state_bytes"]["Muon momentum, AdamW moments"]
    assert state == {"dense": 4 * matrices + 8 * others, "experts": 4 * plan["parameters_of_rank"]["experts"]}
    # In bf16, on CUDA: each rank sends three quarters of the rows.
    assert sharded["gradient_bytes"]["dense"] - adamw["gradient_bytes"]["dense"] == 2 * matrices * 3 // 4


def test_replicas_need_what_a_run_on_the_ranks_of_one_needs_and_send_the_sums_between_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("small", "--ep", "2", "--shard", "full", "--micro-batch", "1")
    one = plan_of(capsys, *arguments, "--world", "4", "--batch", "4")
    two = plan_of(capsys, *arguments, "--world", "8", "--batch", "8", "--replicate", "2")
    assert two["state_bytes"] == one["state_bytes"] and two["replicate"] == 2
    more = {name: size - one["gradient_bytes"][name] for name, size in two["gradient_bytes"].items()}
    assert more == one["state_bytes"]["gradients"]  # a ring of two sends as much as there is
    assert main(["plan", *arguments, "--world", "8", "--batch", "8", "--replicate", "2"]) == 0
    assert "sharded: full, in 2 replicas" in capsys.readouterr().out
    message = refused(capsys, *arguments, "--world", "8", "--batch", "8", "--replicate", "3")
    assert "parallel.replicate (3) must divide the number of workers (8)" in " ".join(message.split())


def test_the_rank_with_most_experts_counts(capsys: pytest.CaptureFixture[str]) -> None:
    # 8 experts over 3 ranks: 3 3 2.
    even, uneven = (plan_of(capsys, "tiny", "--world", str(world), "--batch", "24") for world in (8, 3))
    assert uneven["parameters_of_rank"]["experts"] == 3 * even["parameters_of_rank"]["experts"]
    per_token = [plan["activation_bytes"]["routed experts"] * world for plan, world in ((even, 8), (uneven, 3))]
    assert per_token[1] > per_token[0]


def test_a_bucket_of_gradients_is_as_large_as_the_largest_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (DEEPSEEK, "--world", "512", "--ep")
    assert plan_of(capsys, *arguments, "64")["bucket_bytes"] == 4 * 129280 * 7168
    assert (
        plan_of(capsys, *arguments, "4")["bucket_bytes"] == 4 * 64 * 2 * 2048 * 7168
    )  # the stack of a layer's experts
    assert plan_of(capsys, "tiny", "--world", "1")["bucket_bytes"] == 0


def test_settings_of_a_run_count_and_options_override_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / CONFIG_FILE).write_text(config_to_yaml(load_config("tiny")))
    run = plan_of(capsys, str(tmp_path))
    config = load_config("tiny")
    assert (run["world_size"], run["seq_len"]) == (config.cluster.num_workers, config.model.max_seq_len)
    changed = plan_of(
        capsys, str(tmp_path), "--world", "8", "--ep", "4", "--batch", "32", "--micro-batch", "2", "--seq-len", "32",
        "--dtype", "bfloat16", "--recompute",
    )  # fmt: skip
    names = ("world_size", "ep_size", "global_batch_size", "micro_batches", "seq_len", "dtype", "recompute")
    assert [changed[name] for name in names] == [8, 4, 32, 2, 32, "bfloat16", "full"]
    assert list(changed["activation_bytes"]) == ["inputs of what is recomputed", "head and loss"]


def test_nodes_decide_what_crosses_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    inside = plan_of(capsys, DEEPSEEK, "--world", "64", "--ep", "8")["all_to_all_bytes"]
    assert set(inside) == {"assignment", "rank"}  # one node: nothing to do for the exchange by nodes
    assert inside["rank"]["forward"]["network"] == 0 < inside["rank"]["forward"]["node"]
    across = plan_of(capsys, DEEPSEEK, "--world", "64", "--ep", "64")
    assert across["exchange"] == "node"
    sent = across["all_to_all_bytes"]
    # A token of DeepSeek-V3 goes to at most 4 of 8 groups, here a node each.
    assert sent["node"]["forward"]["network"] < sent["rank"]["forward"]["network"] * 4 / 7


def test_conclusion_names_the_largest_parts_and_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEEPSEEK, "--world", "2048", "--ep", "64"]) == 1
    *_, conclusion = capsys.readouterr().out.strip().split("\n\n")
    words = " ".join(conclusion.split())
    assert words.startswith("Fits in 80 GiB: no, ")
    for part in ("dense parameters with gradients and moments 255 GiB", "--recompute", "--shard full"):
        assert part in words
    assert main(["plan", DEEPSEEK, "--world", "2048", "--ep", "64", "--memory-gib", "70"]) == 1
    assert "That is not enough; shorter sequences (--seq-len)" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "small", "--memory-gib", "2"]) == 0
    assert "Fits in 2 GiB: yes, " in capsys.readouterr().out


def sent_bytes(plan: dict[str, Any]) -> float:
    exchange = plan["all_to_all_bytes"][plan["exchange"]]
    return float(sum(sum(way.values()) for way in exchange.values()) + sum(plan["gradient_bytes"].values()))


def test_fit_adds_savings_until_a_rank_fits_and_says_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (DEEPSEEK, "--world", "256", "--fit", "--memory-gib")
    found = plan_of(capsys, *arguments, "100")  # all savings but those of the moments
    assert list(found["tried"]) == [
        "as given",
        "shard optimizer",
        "shard full",
        "recompute attention",
        "recompute experts",
        "recompute full",
    ]
    assert found["fits"] and found["optimizer"] == "adamw" and found["recompute"] == "full" and found["shard"] == "full"
    given = (DEEPSEEK, "--world", "256", "--shard", "full", "--recompute", "--memory-gib", "100", "--ep")
    same, other = (plan_of(capsys, *given, size) for size in ("256", "128"))
    assert (same["ep_size"], same["peak_bytes"]) == (found["ep_size"], found["peak_bytes"])
    assert other["fits"] and sent_bytes(other) > sent_bytes(found)
    assert "--workers 256 " in found["options"] and "--parallel.shard full" in found["options"]
    tight = plan_of(capsys, *arguments, "10")
    assert not tight["fits"] and tight["peak_bytes"] == min(tight["tried"].values())
    assert list(tight["tried"])[-2:] == ["adamw_bf16", "offload states"]
    pasted = override(load_config("tiny"), tight["options"].split())
    assert (pasted.parallel.ep_size, pasted.optim.name) == (tight["ep_size"], "adamw_bf16")
    assert pasted.optim.offload == "states"


def test_fit_gives_up_copies_of_experts_before_it_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "copies.yaml").write_text("parallel: {expert_copies: 1}")
    found = plan_of(capsys, str(tmp_path / "copies.yaml"), "--fit", "--memory-gib", "0.01")
    assert list(found["tried"])[:4] == ["as given", "micro-batches of 1", "no copies of experts", "shard optimizer"]
    assert "--parallel.expert_copies 0 " in found["options"]


def test_a_context_that_leaves_a_rank_without_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("tiny", "--world", "5", "--batch", "5", "--context", "5", "--seq-len", "6")
    assert "parallel.context (5) leaves a rank without tokens" in refused(capsys, *arguments)


def test_offload_moves_the_moments_to_the_host_and_leaves_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (DEEPSEEK, "--world", "256", "--shard", "full", "--offload")
    without, offloaded = (plan_of(capsys, *arguments, choice) for choice in ("none", "states"))
    assert offloaded["host_bytes"] == without["state_bytes"]["AdamW moments"]
    assert without["host_bytes"] == {"dense": 0, "experts": 0}
    # Two pieces: gate and up of one expert, 2 x 2048 x 7168 fp32, are 224 MiB, below the size of a piece.
    pieces = 2 * 256 * 2**20
    saved = sum(without["state_bytes"]["AdamW moments"].values()) - pieces
    assert offloaded["peak_bytes"] == without["peak_bytes"] - saved
    # With two experts a rank they are 448 MiB, alone in their piece.
    more = plan_of(capsys, DEEPSEEK, "--world", "256", "--ep", "128", "--shard", "none", "--offload", "states")
    embedding = 129280 * 7168 * 4 * 2
    assert more["state_bytes"]["pieces of offloaded states"] == {"dense": 2 * embedding, "experts": 0}
    assert main(["plan", *arguments, "states"]) in (0, 1)
    assert "AdamW moments, in host memory" in capsys.readouterr().out


def test_fit_without_a_world_takes_the_fewest_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (DEEPSEEK, "--memory-gib", "1100", "--fit", "--seq-len", "128")
    found = plan_of(capsys, *arguments)
    assert found["fits"] and found["world_size"] == 8
    assert not plan_of(capsys, *arguments, "--world", "4")["fits"]
    assert "is too little for" in refused(capsys, DEEPSEEK, "--memory-gib", "1", "--fit", "--ep", "256")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEEPSEEK], "does not say how many ranks there are; give --world N"),
        ([DEEPSEEK, "--world", "2048", "--ep", "60"], "parallel.ep_size (60) must divide the number of workers (2048)"),
        ([DEEPSEEK, "--world", "512", "--ep", "512"], "ep_size (512) must be between 1 and num_experts (256)"),
        ([DEEPSEEK, "--world", "64", "--ep", "8", "--batch", "65"], "65) must be a multiple of cluster.num_workers"),
        ([DEEPSEEK, "--world", "64", "--ep", "8", "--ranks-per-node", "6"], "--ranks-per-node (6) must divide the"),
        ([DEEPSEEK, "--world", "24", "--ep", "6", "--ranks-per-node", "4"], "(4) must divide --ep (6), or be a"),
        (["small", "--seq-len", "0"], "--seq-len: '0' must be a whole number of at least 1"),
        (["nowhere"], "'nowhere' is neither a preset, nor a file, nor a run; give a YAML file"),
        (["tinny"], "'tinny' is neither a preset, nor a file, nor a run; did you mean tiny?"),
        (["small", "--worlds", "8"], "--worlds is an option of the simulation; add --simulate, or leave it out"),
        (["small", "--max-vio", "1"], "--max-vio is an option of the simulation; add --simulate"),
        (["nowhere.json", "--world", "8"], "nowhere.json cannot be read: No such file"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "must hold names and values"), ('{"model_type": "gpt2"}', "'gpt2'")],
)
def test_a_config_json_that_is_none_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert message in refused(capsys, str(tmp_path), "--world", "8")


def test_a_simulation_says_what_imbalance_costs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("small", "--world", "8", "--simulate", "--max-vio", "0", "1", "--worlds", "8", "64")
    found = plan_of(capsys, *arguments, "--out", str(tmp_path))
    assert [each["times_balanced"] > 1 for each in found["here"]["costs"]] == [False, True]
    assert [each["world_size"] for each in found["worlds"]] == [8, 64]
    assert found["sensitivity"]["max_vio"] == 1
    assert json.loads((tmp_path / "simulation.json").read_text()) == found
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "on 8 ranks of h100" in printed
    assert "MaxVio itself" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "abacus"), "--hardware abacus is neither h100, h800, h200, b200, cpu nor a file"),
        (("--max-vio", "9"), "--max-vio 9 must be between 0 and 3"),
        (("--worlds", "12"), "--worlds 12 must be a multiple of --ranks-per-node (8)"),
        (("--trace", "no_such_run"), "no_such_run"),
        (("--law", "sign"), "--law needs --trace"),
        (("--context", "2"), "--simulate does not know parallel.context (2)"),
        (("--pp", "2", "--batch", "16", "--micro-batch", "1"), "--simulate does not know parallel.pipeline.size (2)"),
    ],
)
def test_a_simulation_of_what_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, "small", "--world", "8", "--simulate", *arguments)


def test_a_simulation_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_of(capsys, "small", "--world", "8", "--simulate", "--worlds", "8", "--shard", "full")
    assert found["notes"] == []
    settings = ("--shard", "full", "--offload", "states", "--optimizer", "adamw_bf16")
    found = plan_of(capsys, "small", "--world", "8", "--simulate", "--worlds", "8", *settings)
    assert [note.split(":")[0] for note in found["notes"]] == ["optim.offload", "optim.name adamw_bf16"]
