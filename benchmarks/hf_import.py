"""Measures peak memory and time of `trimtab import`, whose bound is the rank's shard plus 1.2 times the largest tensor.

    python -m benchmarks.hf_import [--workers 4] [--folder DIR]

Makes a random Mixtral of 1.3 GB in safetensors files and imports it with one process for each worker. It prints each
process's shard, the peak of its memory beyond what it had before, and the bound. Exit code 1 if a peak is above its
bound. Linux only: elsewhere the peak is not known.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from workers.model.families import Settings, family_of
from workers.model.hugging_face.importing import ImportedShard, import_shard
from workers.model.hugging_face.source import open_source

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "vocab_size": 32000,
}
BOUND = 1.2  # largest tensors beyond the shard


def write_model(folder: Path) -> None:
    """Write a random model: a file for each layer, and one for the rest."""
    settings = Settings(CONFIG, "config")
    family = family_of(settings)
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for part in family.parts(family.read_config(settings)):
        words = part.name.split(".")
        key = words[2] if words[1] == "layers" else "rest"
        files.setdefault(f"model-{key}.safetensors", []).append((part.name, part.shape))
    weight_map = {}
    for file, entries in files.items():
        save_file({name: torch.randn(shape) for name, shape in entries}, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in entries}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(folder: Path, run_dir: Path, num_workers: int) -> list[ImportedShard]:
    """Import the model with `num_workers` processes; what each of them held."""
    config = replace(open_source(folder).config, max_seq_len=256)
    run_dir.mkdir()
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(import_shard, folder, run_dir, config, rank, num_workers) for rank in range(num_workers)]
        return [future.result() for future in futures]


def main() -> int:
    """Write, import, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="processes that hold a shard each (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the model and the run are written for the time (temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "model"
        folder.mkdir()
        write_model(folder)
        tensors = open_source(folder).tensors.values()
        total, largest = sum(tensor.num_bytes for tensor in tensors), max(tensor.num_bytes for tensor in tensors)
        began = time.perf_counter()
        shards = measure(folder, Path(name) / "run", options.workers)
        seconds = time.perf_counter() - began
    sys.stdout.write(f"model {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, {seconds:.1f} s\n")
    within = True
    for rank, shard in enumerate(shards):
        bound = shard.shard_bytes + BOUND * largest
        within &= shard.peak_bytes <= bound
        sys.stdout.write(
            f"rank {rank}: shard {shard.shard_bytes / 1e6:.0f} MB, peak {shard.peak_bytes / 1e6:.0f} MB, "
            f"bound {bound / 1e6:.0f} MB, {(shard.peak_bytes - shard.shard_bytes) / largest:.2f} largest tensors "
            "beyond the shard\n"
        )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
