"""`trimtab train --init RUN`: a new run that begins with the weights and biases of another one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from runtime.runs.run_dir import HF_FOLDER
from workers.checkpoints.checkpoint_files import (
    CHECKPOINTS,
    checkpoint_path,
    read_manifest,
    sync_folder,
    write_manifest,
)


def make_initial_checkpoint(source: Path, run_dir: Path) -> Path:
    """Make `source`, a verified checkpoint of another run, the checkpoint of step 0 of a new run. Returns its path.

    The files are hard links where the file system allows it: the other run may go on, or be removed. Optimizer, law and
    position in the text begin anew, as those of a model imported from Hugging Face do; `extra.imported` marks both. If
    the other run was imported itself, the files kept for its export are copied, too.
    """
    final = checkpoint_path(run_dir / CHECKPOINTS, 0)
    partial = final.with_name(f".{final.name}.init.partial")
    partial.mkdir(parents=True)
    manifest = read_manifest(source)
    for name in manifest.files:
        _link(source / name, partial / name)
    num_counts = len(manifest.extra["load_since_eval"])
    extra = {"step": 0, "imported": True, "load_since_eval": [0] * num_counts, "model": manifest.extra["model"]}
    write_manifest(partial, replace(manifest, step=0, extra=extra))
    kept = source.parents[1] / HF_FOLDER
    if kept.is_dir():  # Before the rename below: once the checkpoint is there, the run can be resumed and exported.
        shutil.copytree(kept, run_dir / HF_FOLDER)
    partial.rename(final)
    sync_folder(final.parent)
    return final


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, target)
