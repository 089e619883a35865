"""`trimtab train --init RUN`: a new run that begins with the weights and biases of another one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from runtime.runs.hf_files import FOLDER
from workers.checkpoints.checkpoint_files import (
    CHECKPOINTS,
    checkpoint_path,
    read_manifest,
    sync_folder,
    write_manifest,
)


def begin_with(source: Path, run_dir: Path) -> Path:
    """Give a new run `source`, a verified checkpoint of another run, for its checkpoint of step 0; returns that.

    Its files are shared by hard links where the disk allows it, so that the other run may go on or be removed.
    Optimizer, law and place in the text begin anew: `extra.imported` says so, as of a model of Hugging Face, whose kept
    files come along.
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
    kept = source.parents[1] / FOLDER
    if kept.is_dir():  # before the checkpoint, whose name says that the run can be resumed and exported
        shutil.copytree(kept, run_dir / FOLDER)
    partial.rename(final)
    sync_folder(final.parent)
    return final


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, place)
