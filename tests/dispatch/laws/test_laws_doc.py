"""The example of docs/laws.md, as a reader would use it."""

import importlib
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from dispatch.balance import LossFreeBalancer
from dispatch.config import RouterConfig
from dispatch.laws import LAWS, BalanceConfig
from dispatch.routing.router import Router
from workers.control.wire import LoadReport, Seed, VersionedState, WireError, decode, encode, law_checksum

DOC = Path(__file__).parents[3] / "docs" / "laws.md"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that holds the example's code, importable and not imported yet."""
    (code,) = re.findall(r"```python\n# my_laws.py\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "laws_of_a_reader.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "laws_of_a_reader"
    sys.modules.pop("laws_of_a_reader", None)
    LAWS.forget("damped")


def test_the_law_of_the_example_balances_a_router(module):
    config = BalanceConfig(law="damped", module=module, options={"damping": 0.3})
    torch.manual_seed(0)
    router = Router(16, RouterConfig(num_experts=8, top_k=2))
    x_TH = torch.randn(2000, 16) + torch.randn(16)
    balancer = LossFreeBalancer(router, config)
    loads = []
    for _ in range(40):
        router(x_TH)
        loads.append(balancer.step())
    assert loads[0].max() > 1000 > 600 > loads[-1].max()
    assert balancer.state.extras["last"].shape == (8,)


def test_a_process_that_got_the_settings_by_pickle_imports_the_module(module):
    pickled = pickle.dumps(BalanceConfig(law="damped", module=module))
    del sys.modules[module]
    LAWS.forget("damped")  # as in a fresh worker
    assert pickle.loads(pickled).entry.options == {"damping": 0.5}


def test_every_law_is_in_the_table_with_its_rate_and_options():
    importlib.import_module("dispatch.laws")
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", DOC.read_text(), re.MULTILINE))
    ours = {name: entry for name, entry in LAWS.items() if entry.rule.__module__.startswith("dispatch.")}
    assert rows.keys() == ours.keys()
    for name, entry in ours.items():
        _, _, rate, options, *_ = (cell.strip() for cell in rows[name].split("|"))
        assert float(rate or 0) == entry.rate
        assert dict(re.findall(r"`(\w+)` ([\d.]+)", options)) == {k: f"{v:g}" for k, v in entry.options.items()}


def test_a_message_cannot_make_a_process_import_a_module(module):
    config = BalanceConfig(law="damped", module=module)
    law_state = LossFreeBalancer(Router(4, RouterConfig(num_experts=4, top_k=1)), config)
    base = VersionedState(0, law_state.state)
    layout = law_state.law.layout
    report = LoadReport(
        run_id="r",
        step=1,
        base_version=0,
        base_checksum=base.checksum,
        law_checksum=law_checksum(config, layout),
        counts_M=torch.zeros(4, dtype=torch.int64),
        seed=Seed(config=config, layout=layout, state=base.state),
    )
    raw = encode(report)
    assert isinstance(decode(raw), LoadReport)
    del sys.modules[module]
    with pytest.raises(WireError, match="not loaded here"):
        decode(raw)
    assert module not in sys.modules
