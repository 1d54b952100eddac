"""Our models as lm-eval's: an adapter that its evaluator asks for log-likelihoods and texts. Needs `jquant[tasks]`.

Text becomes tokens by the tokenizer's own rule: a BOS where it adds one, none where the text, such as a rendered
conversation, begins with it already. Prompts beyond the model's context lose their left end, as in lm-eval's own
models, and are counted in `truncated`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final, final, override

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.batches import BATCH_TOKENS
from eval.completion import Completion, Ending, complete
from eval.likelihood import Likelihood, log_likelihoods
from jquant.errors import DataError
from jquant.models import Llama
from jquant.sampling import GREEDY, Sampler

_SETTINGS: Final = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}
_DRAWN: Final = 1234  # seed of texts that a task wants drawn: lm-eval's own for torch


@final
class HarnessModel(TemplateLM):
    """Answer lm-eval's requests with a model of ours.

    Attributes:
      model: the model.
      tokenizer: its own, a `transformers.PreTrainedTokenizerFast`.
      batch_tokens: tokens, padding counted, that go through the model at once.
      on_request: called with the requests answered and those of the present call.
      truncated: requests so far whose prompt lost its left end.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        *,
        batch_tokens: int = BATCH_TOKENS,
        on_request: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        TemplateLM.__init__(self)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.on_request = on_request
        self.truncated = 0
        if self.eot_token_id is None:
            raise DataError("the tokenizer names no end-of-text token: set eos_token in its tokenizer_config.json")

    @property
    @override
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    @override
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return int(self.eot_token_id if begin is None else begin)

    @property
    def max_length(self) -> int:
        """Return the tokens of the model's context."""
        return self.model.config.max_position_embeddings

    @property
    @override
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @override
    def tok_encode(self, string: str, *, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        begun = string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        special = not begun if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special, verbose=False))

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "this tokenizer has no chat template, so its model is no chat model: measure it without chat template"
            )
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    @override
    def loglikelihood(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        return TemplateLM.loglikelihood(self, requests, disable_tqdm=True)

    @override
    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        count = self._counter(len(requests))

        def keep(index: int, result: Likelihood) -> None:
            if requests[index][0] is not None:  # part of a text that is scored window by window
                self.cache_hook.add_partial("loglikelihood", requests[index][0], (result.value, result.greedy))
            count(result.dropped)

        pairs = [(context, continuation) for _, context, continuation in requests]
        results = log_likelihoods(self.model, pairs, batch_tokens=self.batch_tokens, on_result=keep)
        return [(result.value, result.greedy) for result in results]

    @override
    def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> list[float]:
        windows, owners = [], []
        for index, request in enumerate(requests):
            whole = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, whole):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @override
    def generate_until(self, requests: list[Any], **options: Any) -> list[str]:
        """Write on after each prompt, those of equal settings together."""
        count = self._counter(len(requests))
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts: dict[int, str] = {}
        for indices in alike.values():
            self._generate(requests, indices, texts, count)
        return [texts[index] for index in range(len(requests))]

    def _generate(
        self, requests: list[Any], indices: Sequence[int], texts: dict[int, str], count: Callable[[int], None]
    ) -> None:
        def keep(place: int, result: Completion) -> None:
            index = indices[place]
            texts[index] = result.text
            self.cache_hook.add_partial("generate_until", requests[index].args, result.text)
            count(result.dropped)

        prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
        complete(
            self.model,
            self.tokenizer,
            prompts,
            _ending(requests[indices[0]].args[1], self.tokenizer),
            batch_tokens=self.batch_tokens,
            key=jax.random.key(_DRAWN),
            on_text=keep,
        )

    def _counter(self, total: int) -> Callable[[int], None]:
        """Return what is called, with the tokens dropped, once for each of a call's requests."""
        done = 0

        def count(dropped: int) -> None:
            nonlocal done
            done += 1
            self.truncated += dropped > 0
            self.on_request(done, total)

        return count


def _ending(settings: dict[str, Any], tokenizer: Any) -> Ending:
    """Return what a task's generation settings mean here."""
    wanted = normalize_gen_kwargs(settings)
    unknown = sorted(set(wanted) - _SETTINGS)
    if unknown:
        raise DataError(
            f"the task asks for generation by {', '.join(unknown)}, which is not known here; known are "
            f"{', '.join(sorted(_SETTINGS))}"
        )
    sampler = GREEDY
    if wanted["do_sample"]:
        sampler = Sampler(wanted.get("temperature", 1.0), wanted.get("top_k"), wanted.get("top_p"))
    end = tokenizer.eos_token_id
    phrases = handle_stop_sequences(wanted["until"], eos=str(tokenizer.decode([end])))
    return Ending(tuple(filter(None, phrases)), end, wanted["max_gen_toks"], sampler)
