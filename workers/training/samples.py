"""Continues `run.sample_prompts` by the current weights, and notes which experts took each token."""

from typing import Any

from dispatch.values import all_gather_values, list_of
from workers.data.tokenizer import load_tokenizer
from workers.generation.expert_trace import ExpertTrace
from workers.generation.generate import SamplingConfig, encode_prompts, generate
from workers.generation.pieces import text_pieces
from workers.training.rank_state import RankState

Sample = dict[str, Any]


class SampleTaker:
    """Makes the samples of a run. Every rank has one, where `run.sample_prompts` is not empty."""

    def __init__(self, state: RankState) -> None:
        self._state, self._run = state, state.spec.run
        self._tokenizer = load_tokenizer(state.spec.tokenizer)
        self._prompt_ids = encode_prompts(self._tokenizer, self._run.sample_prompts)
        # Generation draws from generators seeded anew at each evaluation, not from torch's default one: training's
        # random state stays as it is, and texts of two steps differ by the weights alone.
        self._sampling = SamplingConfig(
            max_new_tokens=self._run.sample_tokens, temperature=self._run.sample_temperature, seed=self._run.seed
        )

    def take(self) -> list[Sample]:
        """Continue all prompts; returns the lines of samples.jsonl in their order, on every rank.

        Collective: every rank must call it, also one without a prompt. What the routers choose here is no training
        load, and the model is left in training mode.
        """
        state = self._state
        state.groups.tracker.set_phase("samples")
        with ExpertTrace(state.routers) as trace:
            generated = generate(
                state.model,
                self._prompt_ids,
                self._sampling,
                state.groups,
                eod_id=self._tokenizer.eod_id,
                autocast=state.autocast(),
                on_read=trace.on_read,
            )
        chosen = trace.by_sequence()
        own = [self._sample(index, new_ids, chosen[index]) for index, new_ids in generated.new_ids.items()]
        by_rank = all_gather_values(own, state.groups.control_group, list_of(dict))
        return sorted((sample for samples in by_rank for sample in samples), key=lambda sample: int(sample["sample"]))

    def _sample(self, index: int, new_ids: list[int], chosen: dict[str, dict[int, list[int]]]) -> Sample:
        prompt_ids = self._prompt_ids[index]
        num_tokens = len(prompt_ids) + len(new_ids)
        pieces = [*text_pieces(self._tokenizer, prompt_ids), *text_pieces(self._tokenizer, new_ids)]
        return {
            "sample": index,
            "prompt": self._run.sample_prompts[index],
            "tokens": pieces,
            "num_prompt_tokens": len(prompt_ids),
            "experts": {name: [ids.get(position) for position in range(num_tokens)] for name, ids in chosen.items()},
        }
