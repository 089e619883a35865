"""Which run: find it or name it, own it while it is written, and what it keeps of its text.

`run_dir` finds and names run directories, and `run_lock` lets one process alone write each. `run_inputs` opens what a
command reads of a run: its checkpoint and its text, which `run_data` identifies. `hf_files` is what an imported run
keeps of its origin. `event_text` words the events of a run.
"""
