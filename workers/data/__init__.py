"""Turns the text of a run into batches of token ids.

Before a run: `text` finds the sources and holds out documents for validation; `chat` and `chat_rendering` turn
conversations into text; `tokenizer` and `encoding` turn documents into token ids; `prepare` writes them to files once.
In each step: `shards` maps those files into memory, `windows` cuts them into sequences, `mix` says how many sequences
of each source a batch has, and `sampler` which of them each rank reads. Begin with `sampler` for what a step trains
on, with `text.DataConfig` for the settings.
"""
