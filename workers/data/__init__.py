"""From the text of a run to the token ids of a batch.

The way of a text: `text` finds the sources and holds out documents for validation; `chat` and `chat_rendering` turn
conversations into text; `tokenizer` and `encoding` turn documents into token ids; `prepare` writes them to files once.
The way of a batch: `shards` maps those files into memory, `windows` cuts them into sequences, `mix` says how many
sequences of each source a batch has, and `sampler` which of them each rank reads in each step. Begin with `sampler`
for what a step trains on, with `text.DataConfig` for the settings.
"""
