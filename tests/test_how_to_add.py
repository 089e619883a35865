"""What docs/how-to-add.md promises: each part is at most one new file and one line of registration."""

import sys
from dataclasses import replace

import pytest

from dispatch.errors import InvalidValue
from dispatch.exchange.registry import BACKENDS
from dispatch.laws import LAWS, BalanceConfig
from runtime import cli
from runtime.settings.config import cross_check
from runtime.settings.config_file import load_config, override
from runtime.settings.size import model_size
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import latest
from workers.checkpoints.state import canonical_state
from workers.distributed.parallel import ParallelConfig
from workers.model import families
from workers.model.families import Settings, family_of, mixtral
from workers.training.optimizer import OPTIMIZERS, OptimConfig
from workers.training.summed_metrics import SUMMED_METRICS, SummedMetric

LAW = '''
from dispatch import LayerLoad, LayerState, register_law


@register_law("capped", rate=0.01)
def capped(load: LayerLoad, state: LayerState, rate: float, *, cap: float = 1.0) -> LayerState:
    """Steps in proportion to the lack of load, up to a cap."""
    mean = load.tokens_E.double().mean()
    return state.moved_by(rate * ((mean - load.tokens_E) / mean).clamp(-cap, cap))
'''
COMMAND = """
HELP = "Count the lines of a file."


def add_arguments(parser):
    parser.add_argument("file")


def run(options):
    print(len(open(options.file).readlines()))
    return 0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of modules of a user's own; what they register is forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for registry, name in ((BACKENDS, "plain"), (LAWS, "capped"), (OPTIMIZERS, "sgd")):
        if name in registry:
            registry.forget(name)
    for module in ("capped_law", "count_lines", "examples.my_exchange", "examples.my_optimizer"):
        sys.modules.pop(module, None)


def _train(rank, world_size, spec, name):
    """The checkpoint of a run with this optimizer, law and exchange: lines, all state, and the exchange in force."""
    SUMMED_METRICS.append(SummedMetric("tokens_away", lambda rank: rank.moved.sent, per=lambda rank: rank.num_tokens))
    spec = replace(spec, run_dir=spec.run_dir / name)
    worker = join_worker(spec, rank, world_size, name)
    worker.train()
    lines = [line for line in worker.progress(0) if line.get("kind") == "train"]
    rates = {group["lr"] / lines[-1]["lr"] for group in worker._state.optimizer.param_groups} if rank == 0 else None
    layer = next(module for module in worker._state.model.modules() if hasattr(module, "dispatcher"))
    return lines, whole_state(worker), rates, layer.dispatcher.exchange


def _resume(rank, world_size, spec, path):
    worker = join_worker(spec, rank, world_size, "resumed")
    state = worker._state
    tensors = canonical_state(state.model, state.optimizer, state.spec.optim.entry.initial_state)
    checkpoint.load(path, tensors, state.groups.control_group, sections=("model", "optim"))
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.slow
def test_a_run_takes_an_exchange_a_law_an_optimizer_and_a_metric_of_ones_own(folder):
    (folder / "capped_law.py").write_text(LAW)
    spec = replace(
        make_spec(folder, steps=3),
        optim=OptimConfig(name="sgd", module="examples.my_optimizer", options={"momentum": 0.8}, lr=3e-3),
        balance=BalanceConfig(law="capped", module="capped_law"),
        parallel=ParallelConfig(exchange="plain", module="examples.my_exchange"),
    )
    lines, saved, rates, exchange = run_ranks(2, _train, spec, "own")[0]
    assert exchange == "plain"
    assert rates == {1.0, 0.5}  # lr_scale of the vectors
    assert all(line["tokens_away"] == 2 * 2 for line in lines)  # top_k x MoE layers, over the tokens of the batch
    assert any(bool(tensor.any()) for name, tensor in saved.items() if name.endswith("expert_bias_E"))
    # The optimizer's own state is in the checkpoint, expert by expert: another number of ranks reads it to the bit.
    momenta = [name for name in saved if name.startswith("optim.momentum_buffer.")]
    assert sum(".experts." in name for name in momenta) == 2 * 8 * 2  # layers, experts, weights
    path = latest(spec.run_dir / "own" / "checkpoints")
    resumed = run_ranks(1, _resume, spec, path)[0]
    assert resumed.keys() == saved.keys()
    assert all(resumed[name].equal(saved[name]) for name in resumed)


def test_the_settings_know_what_a_module_registers_and_refuse_before_anything_starts(folder):
    config = override(load_config("tiny"), ["--parallel.module=examples.my_exchange", "--parallel.exchange=plain"])
    config = override(config, ["--optim.module=examples.my_optimizer", "--optim.name=sgd"])
    sizes = [model_size(config.model, optim) for optim in (OptimConfig(), config.optim)]
    # A weight and the state, 4 bytes each: AdamW has two of them, SGD one.
    assert sizes[0].checkpoint_bytes * 8 == sizes[1].checkpoint_bytes * 12
    fp8 = override(config, ["--parallel.payload=fp8"])
    with pytest.raises(InvalidValue, match="payload 'fp8' is not for exchange 'plain'"):
        cross_check(fp8)
    with pytest.raises(InvalidValue, match=r"optim.options has 'beta', but optimizer 'sgd' knows momentum"):
        override(config, ["--optim.options={beta: 0.9}"])
    with pytest.raises(InvalidValue, match=r"optim.name is 'adam'; it must be one of adamw, .*come with optim.module"):
        OptimConfig(name="adam")


def test_one_line_makes_the_name_of_a_part_ours(monkeypatch):
    monkeypatch.setitem(BACKENDS.builtin, "plain", "examples.my_exchange")
    assert ParallelConfig(exchange="plain").backend.automatic is False
    BACKENDS.forget("plain")
    sys.modules.pop("examples.my_exchange")


def test_a_family_is_one_entry(monkeypatch):
    mine = replace(mixtral.FAMILY, model_type="mine", architecture="MineForCausalLM")
    monkeypatch.setitem(families.FAMILIES, mine.model_type, mine)
    assert family_of(Settings({"model_type": "mine", "architectures": ["MineForCausalLM"]}, "config.json")) is mine


def test_a_subcommand_is_one_module_and_one_line(folder, monkeypatch, capsys):
    (folder / "count_lines.py").write_text(COMMAND)
    monkeypatch.setitem(cli.COMMANDS, "count", "count_lines")
    (folder / "text").write_text("a line\n")
    assert cli.main(["count", str(folder / "text")]) == 0
    assert capsys.readouterr().out == "1\n"
