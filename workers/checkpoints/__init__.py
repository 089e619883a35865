"""Saving the training state of a gang, and loading it on any number of ranks.

What a checkpoint contains is assembled in `workers.training.training_run` (`TrainingRun._snapshot`). Begin with
`checkpoint`: save and load in the format of torch.distributed.checkpoint (DCP). `state` gives every tensor a
name that does not depend on the ranks; `shares` decides which rank saves it; `dcp` writes and reads the tensors;
`slices` names the rows of a sharded tensor; `checkpoint_files` names the files of a checkpoint and finds damage;
`index` reads DCP's list of tensors. Beside the training: `staging` copies the shares between two steps, `background`
runs jobs on threads, `disk_saver` writes to the disk, `memory_checkpoint` keeps copies in the memory of other ranks.
`tensor_reader` reads single tensors, for export and inspection.
"""
