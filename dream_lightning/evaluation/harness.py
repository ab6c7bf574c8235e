"""Dream in lm-evaluation-harness, under the name `dream`: `python -m dream_lightning.evaluation.harness --help`.

lm_eval has no plug-ins for models: `lm_eval --model dream` knows Dream only in a process that has imported this file.
"""

import sys
from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401  (registers the others, which lm_eval does only while none is registered)
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from dream_lightning.answering import answer_ids, answer_texts
from dream_lightning.data.prompt_format import encode_rendered
from dream_lightning.errors import UserError, check_range
from dream_lightning.evaluation.likelihood import nll_bounds
from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.params import resized, with_fields
from dream_lightning.viewer.commands import open_model


class DreamLM(TemplateLM):
    """The LM of lm_eval that answers with a Dream.

    `loglikelihood` is the lower bound −`nll_bounds`. `is_greedy` says whether the model fills in the masked
    continuation as it is, at each step the most probable token of all. Prompts that do not fit are cut on the left with
    a warning.

    Args:
        pretrained: folder, hub id or checkpoint; or a DreamModel, with its tokenizer.
        tokenizer: folder, hub id or `bytes`; by default the model's own.
        batch_size: rows of a forward.
        device: cpu, cuda, …; auto uses a GPU if there is one.
        max_length: tokens of context and continuation; by default 2,048, Dream's training length, or the model's
            positions if they are fewer. `loglikelihood_rolling` cuts longer texts into windows.
        draws: masks of a likelihood, see `nll_bounds`.
        add_bos_token: begin every prompt with bos, as the authors evaluate base models.
        think_end_token: remove an answer's thinking up to this text, such as `</think>`.
        sampling: fields of SamplingParams, by default those with `forbid_mask`. `max_new_tokens` is for tasks that set
            no `max_gen_toks`; for others, `steps` changes in proportion, and whole blocks are generated.

    Raises:
        UserError: a wrong option; as `open_model` and `SamplingParams`.
    """

    def __init__(
        self,
        pretrained: str | DreamModel,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        draws: int = 128,
        seed: int = 0,
        add_bos_token: bool = False,
        think_end_token: str | None = None,
        **sampling: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise UserError(
                f"batch_size is {batch_size!r}, wanted a number: it is not searched, and max_batch_size unused"
            )
        if device and device.startswith("cuda") and not torch.cuda.is_available():  # the default of lm_eval's command
            rank_zero_warn(f"device is {device} and there is no CUDA GPU: the CPU is used")
            device = "cpu"
        if isinstance(pretrained, str):
            pretrained, tokenizer = open_model(pretrained, tokenizer=tokenizer, device=device or "auto")
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, int(batch_size)
        positions = self.model.config.max_position_embeddings
        check_range("max_length", max_length, least=2, most=positions, whole=True)
        self.max_length = max_length or min(2048, positions)
        self.draws, self.seed, self.add_bos_token, self.think_end_token = draws, seed, add_bos_token, think_end_token
        self.params = with_fields(SamplingParams(forbid_mask=True), {"seed": seed, **sampling}, "model_args")
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of continuations that have none."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = [self.prefix_token_id] if self.add_bos_token and add_special_tokens is not False else []
        return bos + encode_rendered(string, self.tokenizer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the task's stop strings; its generation_kwargs may hold fields of SamplingParams."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            given = requests[numbers[0]].args[1]
            kwargs = normalize_gen_kwargs(given, self.params.max_new_tokens)
            stop, size = [s for s in kwargs.pop("until") if s], kwargs.pop("max_gen_toks")
            if not {"temperature", "do_sample"} & given.keys():  # else a task that sets neither would be greedy
                kwargs.pop("temperature", None)
            kwargs.pop("do_sample")
            params = resized(self.params, size, kwargs, "generation_kwargs")
            room = self.model.config.max_position_embeddings - params.max_new_tokens
            prompts = [self._cut(self.tok_encode(requests[n].args[0]), room) for n in numbers]
            options = {"batch_size": self.batch_size, "stop": () if self.think_end_token else stop}
            texts = answer_texts(self.model, self.tokenizer, prompts, params, **options)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = postprocess_generated_text(text, stop, self.think_end_token)
                self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: the first window after bos, the others after as many tokens as fit."""
        prefix, pairs, owners = self.prefix_token_id, [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, prefix, self.max_length - 1, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        values = [0.0] * len(requests)
        for number, bound in zip(owners, self._bounds(pairs), strict=True):
            values[number] -= bound.nll
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return values

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self._cut(context, self.max_length - len(b)), b) for _, context, b in requests]
        bounds, greedy = self._bounds(pairs), self._greedy(pairs)
        results = [(-bound.nll, same) for bound, same in zip(bounds, greedy, strict=True)]
        for (key, *_), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def _bounds(self, pairs: list[tuple[list[int], list[int]]]) -> list:
        return nll_bounds(self.model, pairs, draws=self.draws, batch_size=self.batch_size, seed=self.seed)

    def _greedy(self, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether each continuation is what the model fills in. One context and length is filled in once."""
        contexts: dict[int, dict[tuple[int, ...], list[int]]] = {}  # by length, then context → what is filled in
        for context, continuation in pairs:
            contexts.setdefault(len(continuation), {})[(*context,)] = []
        for length, filled in contexts.items():
            params = SamplingParams(max_new_tokens=length, steps=length, alg="maskgit_plus", forbid_mask=True)
            answers = answer_ids(self.model, list(filled), params, batch_size=self.batch_size)
            filled.update(zip(filled, answers, strict=True))
        return [contexts[len(continuation)][(*context,)] == continuation for context, continuation in pairs]

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        if room < 1:
            raise UserError(
                f"a continuation leaves {room} of {self.max_length} tokens for its context: raise max_length"
            )
        if len(tokens) > room:
            rank_zero_warn(
                f"a prompt of {len(tokens):,} tokens is cut to its last {room:,}: use fewer few-shot examples"
            )
        return tokens[-room:]


def main() -> None:
    """lm_eval's own command line, whose default is `--model dream`."""
    given = {word.split("=")[0] for word in sys.argv[1:]}
    runs = len(sys.argv) > 2 and sys.argv[1].startswith(("run", "-"))  # and not `ls tasks`
    if runs and not given & {"--model", "-M", "--config", "-C"}:
        sys.argv += ["--model", "dream"]
    cli_evaluate()


# By name and not as a class: `python -m` would register two, that of __main__ and that of the package.
model_registry.register("dream", target="dream_lightning.evaluation.harness:DreamLM")

if __name__ == "__main__":
    main()
