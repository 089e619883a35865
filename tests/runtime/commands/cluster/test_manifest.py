"""The manifests as the command writes them: the commands in them are read back and understood by our own parsers."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.nodes.node import NodeOptions
from runtime.cli import main
from runtime.settings.config_file import config_to_yaml, load_config, parse_train

TRAIN = ("--config", "tiny", "--run.global_batch_size", "16", "--run.name", "it's $HOME; `x`")
KUBERAY = ("kuberay", "--nodes", "2", "--image", "registry.example/trimtab:1", "--claim", "shared")
SLURM = ("slurm", "--nodes", "2", "--cpus-per-node", "4")
RAY_UP = ("ray-up", "--head", "10.0.0.1", "--worker", "10.0.0.2", "--ssh-user", "me", "--gpus-per-node", "8")


def manifest(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["cluster", "manifest", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[NodeOptions]:
    """What `up` and `join` would have started."""
    import cluster.nodes.node

    asked: list[NodeOptions] = []

    def record(options: NodeOptions, _: object) -> None:
        asked.append(options)
        raise cluster.nodes.node.NodeFailed("not in this test")

    monkeypatch.setattr(cluster.nodes.node, "start", record)
    return asked


def words_after(text: str, first: str) -> list[str]:
    """The shell's own reading of the command that begins with `first`, up to the end of the script."""
    start = text.index(first)
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text[start:].strip()}"], capture_output=True, text=True, check=True
    )
    return printed.stdout.split("\0")[:-1]


def check_training(words: list[str], device: str, num_workers: int) -> None:
    assert words[:2] == ["trimtab", "train"]
    config = parse_train(words[2:]).config
    assert (config.cluster.address, config.cluster.num_workers, config.cluster.device) == ("auto", num_workers, device)
    assert (config.run.dir, config.data.cache_dir) == ("/shared/runs", "/shared/cache")
    assert config.run.name == "it's $HOME; `x`"
    assert config.model.hidden == 32  # of the preset tiny: what came behind -- is there


def test_the_rayjob_trains_with_a_command_that_we_understand(capsys):
    job = yaml.safe_load(manifest(capsys, *KUBERAY, "--gpus-per-node", "4", "--", *TRAIN))
    assert job["kind"] == "RayJob"
    check_training(shlex.split(job["spec"]["entrypoint"]), "cuda", 8)
    stays = yaml.safe_load(manifest(capsys, *KUBERAY, "--stay"))
    assert (stays["kind"], "entrypoint" in stays["spec"]) == ("RayCluster", False)
    assert (
        stays["spec"]["headGroupSpec"]["template"]
        == yaml.safe_load(manifest(capsys, *KUBERAY))["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    )


def train_words(script: str, number: int, run_dir: Path, **variables: str) -> list[str]:
    """The command of the training, as bash makes it at the job's start of this number."""
    start, end = script.index("run="), script.index("# The address")
    lines = script[start:end].replace("/shared/runs", str(run_dir.parent))
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(number), "PATH": "/usr/bin:/bin"}
    told = f"set -euo pipefail\n{lines}\nprintf '%s\\0' \"${{train[@]}}\""
    done = subprocess.run(["bash", "-c", told], env=environment | variables, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_the_slurm_script_trains_with_a_command_that_we_understand(capsys, tmp_path):
    out = tmp_path / "job.sh"
    assert manifest(capsys, *SLURM, "--out", str(out), "--", *TRAIN) == f"{out}\n"
    text = out.read_text()
    words = train_words(text, 0, Path("/shared/runs/any"))
    check_training(words, "cpu", 2)
    cluster = parse_train(words[2:]).config.cluster
    assert cluster.cpus_per_worker == 4  # else Ray would place both workers on one node
    assert cluster.start_timeout_s > 300  # SlurmdTimeout: Slurm is to end the job, not the run itself
    assert main(["cluster", "token", str(tmp_path / "token")]) == 0  # the command that the script makes its token with
    assert 'trimtab cluster token "$RAY_AUTH_TOKEN_PATH"' in text
    assert "export RAY_AUTH_MODE=token" in text


@pytest.mark.parametrize(("options", "name"), [((), "trimtab-7"), (("--name", "my run"), "my run")])
def test_a_slurm_job_that_starts_again_goes_on_with_its_run(capsys, tmp_path, options, name):
    text, run_dir = manifest(capsys, *SLURM, "--", "--config", "tiny", *options), tmp_path / name
    new = train_words(text, 0, run_dir)
    assert parse_train(new[2:]).config.run.name == name
    assert train_words(text, 1, run_dir) == new  # the node was lost before the run began
    (run_dir / "checkpoints" / ".step_00000010.x.partial").mkdir(parents=True)
    assert train_words(text, 1, run_dir) == new
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.lost-1"]  # it has nothing to go on from
    (run_dir / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert train_words(text, 2, run_dir) == ["trimtab", "train", "--resume", str(run_dir)]
    assert train_words(text, 0, run_dir) == new  # a job of its own does not touch it: `trimtab train` refuses the name


def test_a_slurm_job_goes_on_with_the_run_that_its_options_resume(capsys, tmp_path):
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(config_to_yaml(load_config("tiny")))
    text = manifest(capsys, *SLURM, "--", "--resume", str(run_dir), "--steps", "40")
    assert train_words(text, 0, run_dir)[-4:] == ["--resume", str(run_dir), "--steps", "40"]
    assert f"\nrun={run_dir}\n" in text


def test_ray_up_starts_head_and_nodes_by_commands_that_we_understand(capsys, started, monkeypatch):
    monkeypatch.setenv("RAY_HEAD_IP", "127.0.0.1")  # as Ray sets it, but an address with a way to it
    config = yaml.safe_load(manifest(capsys, *RAY_UP))
    for again, line in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert again == "trimtab cluster down"
        words = words_after(line, "trimtab cluster")
        assert words[:2] == ["trimtab", "cluster"]
        assert main(words[1:]) == 1
    up, join = started
    assert (up.address, up.head, up.num_cpus, up.num_gpus) == ("10.0.0.1", None, 8, 8)
    assert up.ray_arguments == ("--autoscaling-config=~/ray_bootstrap_config.yaml",)
    assert (join.head, join.num_cpus, join.num_gpus) == ("127.0.0.1:6379", 8, 8)
    assert up.token_file is not None
    assert [Path(place).expanduser() for place in config["file_mounts"]] == [Path("~/.trimtab/token").expanduser()]


def test_ray_up_gives_the_head_the_key_with_which_it_starts_the_workers(capsys):
    assert yaml.safe_load(manifest(capsys, *RAY_UP))["auth"] == {"ssh_user": "me"}
    key = ["--ssh-key", "~/.ssh/cluster"]
    assert yaml.safe_load(manifest(capsys, *RAY_UP, *key))["auth"]["ssh_private_key"] == "~/.ssh/cluster"


@pytest.mark.parametrize("arguments", [(*KUBERAY, "--", *TRAIN), (*KUBERAY, "--stay"), (*SLURM, "--", *TRAIN), RAY_UP])
def test_no_manifest_opens_the_dashboard_installs_at_start_or_holds_a_secret(arguments, capsys):
    text = manifest(capsys, *arguments)
    assert "dashboard-host" not in text
    assert "0.0.0.0" not in text
    assert "pip install" not in text and "runtimeEnvYAML" not in text and "runtime_env" not in text
    assert "RAY_AUTH_TOKEN:" not in text and "RAY_AUTH_TOKEN=" not in text
    assert "without-token" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SLURM, "--", "--model.hiden", "3"), "did you mean --model.hidden?"),
        (
            (*SLURM, "--nodes", "3", "--", "--run.global_batch_size", "16"),
            "must be a multiple of cluster.num_workers (3)",
        ),
        ((*SLURM, "--time", "soon"), "HOURS:MINUTES:SECONDS"),
        ((*KUBERAY, "--name", "No_Name"), "small letters"),
        ((*KUBERAY, "--claim", "My_Claim"), "'My_Claim' must be at most 253 small letters"),
        ((*RAY_UP, "--worker", "node7"), "'node7' must be an IPv4 address"),
        ((*RAY_UP, "--", *TRAIN), "trimtab submit"),
        (("helm",), "'helm' is no kind; choose from kuberay, slurm, ray-up"),
    ],
)
def test_what_the_nodes_would_refuse_is_refused_here(arguments, message, capsys):
    assert main(["cluster", "manifest", *arguments]) == 2
    assert message in capsys.readouterr().err
