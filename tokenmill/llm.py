"""`LLM`: a model in this process, from text to text, with the engine of the server.

    with LLM("path/to/model") as llm:
        for completion in llm.generate(["Once upon a time", "The capital of France is"], max_new_tokens=20):
            print(completion.text)

Options of the model are those of the server (`tokenmill serve --help`), with underscores. Options of a generation are
the fields of `text.options.Options`, with the names of TGI's API.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from tokenmill.config import Settings
from tokenmill.errors import ArgumentError, BatchError, GenerationError, GrammarError, TemplateError, ValidationError
from tokenmill.misfit import misfit
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.runtime.worker import engine_options
from tokenmill.text.answer_reader import PLAIN, AnswerReader, WholeText
from tokenmill.text.chat import Chat, ChatModel, check_parsers, plan
from tokenmill.text.load import load_tokenizer
from tokenmill.text.options import Options, RequestLimits
from tokenmill.text.output import Delta, fold
from tokenmill.text.prepare import Prepared, prepare
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights import embedded, hub
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import EngineInfo, Output, Progress, Stats, TokenDetails

Prompt = str | Sequence[int]
"""Text, or token ids that are passed to the model unchanged"""

Message = Mapping[str, Any]
"""{"role": …, "content": …}, as the chat template expects it."""

_SERVER_ONLY = ("num_shard", "sharded", "mock")
_MOST = 1 << 20  # stop strings, top tokens: in effect no limit, because the caller owns the process


class Completion(msgspec.Struct, frozen=True):
    """Answer to one prompt.

    `finish_reason`: "stop" (an end-of-sequence token), "stop_sequence" (`stop` is the string) or "length".
    `token_ids`: all generated tokens, including a last one that `text` omits. `text`: all that was generated, a thought
    included; of a chat's answer `reasoning` is the thought alone, and `content` the answer behind it.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    stop: str | None = None
    seed: int | None = None  # seed that reproduces the answer; None if it was greedy
    num_cached: int = 0  # prompt tokens found in the prefix cache
    logprobs: tuple[TokenDetails, ...] = ()  # one per token, if requested
    prompt_logprobs: tuple[TokenDetails, ...] = ()  # of prompt tokens from the second on, if requested
    reasoning: str = ""
    content: str = ""


class _Question(NamedTuple):
    """One prompt with its options, and the reader of its answer."""

    prompt: Prompt
    options: Options
    reader: AnswerReader = PLAIN
    add_special_tokens: bool = True


class _Running(NamedTuple):
    """One request, checked, and the reader of its answer."""

    prepared: Prepared
    reader: AnswerReader


class LLM:
    """Model in this process. Not thread-safe.

    `model`: a folder, a .gguf file or a Hub id; None: the embedded default model. `options`: options of the server,
    such as `dtype`, `max_total_tokens`, `max_batch_size`, `memory_limit`, `cpu_threads`; its environment variables
    apply too. The constructor blocks until the model is loaded, and raises StartError with the remedy.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        settings = _settings(model, options)
        source = _source(settings)
        check_parsers(settings.tool_call_parser, settings.reasoning_parser)
        self.tokenizer = load_tokenizer(source)
        self._chats = ChatModel(self.tokenizer, settings.tool_call_parser, settings.reasoning_parser)
        self._engine = OfflineEngine(assemble(source, engine_options(settings), Group(), _say_nothing))
        info = self._engine.info
        self._limits = RequestLimits(
            max_input_tokens=info.max_input_tokens,
            max_total_tokens=info.max_total_tokens,
            max_stop_sequences=_MOST,
            max_best_of=1,
            max_top_n_tokens=min(_MOST, info.vocab_size),
            vocab_size=info.vocab_size,
            grammars=True,
            watermark_gamma=0.5 if settings.watermark_gamma is None else settings.watermark_gamma,
            watermark_delta=2.0 if settings.watermark_delta is None else settings.watermark_delta,
        )

    @property
    def info(self) -> EngineInfo:
        """Description of the loaded model, and its limits."""
        return self._engine.info

    @property
    def stats(self) -> Stats:
        """Statistics of the engine after its last step."""
        return self._engine.stats

    def generate(
        self, prompts: Prompt | Sequence[Prompt], options: Options | None = None, **params: Any
    ) -> list[Completion]:
        """Answer one or several prompts in one batch, and return the answers in the order of the prompts.

        `params`: fields of `Options`, which take precedence over `options`. By default the answer is greedy and ends
        with the model's end-of-sequence token. Raises ValidationError before any generation, for an invalid prompt or
        option (GrammarError for a grammar). Raises BatchError, with the other answers, if the engine fails on a prompt.
        """
        chosen = _chosen(options, params)
        return self._answers(self._prepare([_Question(prompt, chosen) for prompt in _as_list(prompts)]))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        options: Options | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> list[Completion]:
        """Answer one or several conversations. `template`: variables for the chat template.

        Stop strings, `min_new_tokens` and a grammar are about the answer behind the thought, as in the server;
        `thinking_budget` ends the thought. Raises as `generate` does, and TemplateError if the model has no chat
        template or the template fails.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        chosen = _chosen(options, params)
        questions = [self._plan(conversation, chosen, template) for conversation in many]  # type: ignore[arg-type]
        return self._answers(self._prepare(questions))

    def stream(self, prompt: Prompt, options: Options | None = None, **params: Any) -> Iterator[str]:
        """Yield the answer's text in pieces, as it is generated. Closing the iterator ends the generation.

        The call raises ValidationError, the iterator GenerationError.
        """
        return self._stream(_Question(prompt, _chosen(options, params)))

    def stream_chat(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> Iterator[str]:
        """Stream the answer to a conversation, its thought included: see `stream` and `chat`."""
        return self._stream(self._plan(messages, _chosen(options, params), template))

    def render(self, messages: Sequence[Message], template: Mapping[str, Any] | None = None) -> str:
        """Render a conversation to a prompt with the model's chat template. Raises ValidationError, TemplateError."""
        prompt = self._plan(messages, Options(), template).prompt
        assert isinstance(prompt, str)
        return prompt

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan(self, messages: Sequence[Message], options: Options, template: Mapping[str, Any] | None) -> _Question:
        """Plan the answer to a conversation. Raises ValidationError, TemplateError."""
        if self.tokenizer.chat_template is None:
            raise TemplateError(f"The model {self.info.model_id} has no chat template: use `generate` with a prompt.")
        chat = Chat(messages=[dict(message) for message in messages], options=options, chat_template_kwargs=template)
        return _Question(*plan(chat, self._chats), add_special_tokens=False)

    def _prepare(self, questions: Sequence[_Question]) -> list[_Running]:
        """Validate prompts with their options and return their requests. Waits for the grammars."""
        made = [
            _Running(
                prepare(
                    question.prompt, question.options, self._limits, self.tokenizer,
                    add_special_tokens=question.add_special_tokens,
                ),
                question.reader,
            )
            for question in questions
        ]  # fmt: skip
        for grammar, field in dict.fromkeys((one.prepared.grammar, one.prepared.grammar_field) for one in made):
            if grammar is None:
                continue
            try:
                self._engine.compile(grammar)
            except GrammarError as error:
                raise GrammarError(str(error), field) from None
        return made

    def _answers(self, requests: list[_Running]) -> list[Completion]:
        answers = [_Answer(self._engine, self.tokenizer, *one) for one in requests]
        errors: dict[int, GenerationError] = {}
        try:
            for place, answer in enumerate(answers):
                try:
                    for _ in answer.pieces():
                        pass
                except GenerationError as error:  # it affects this prompt only
                    errors[place] = error
        finally:
            for answer in answers:
                answer.abort()
        if errors:
            found = [None if place in errors else answer.completion() for place, answer in enumerate(answers)]
            raise BatchError(found, errors)
        return [answer.completion() for answer in answers]

    def _stream(self, question: _Question) -> Iterator[str]:
        (request,) = self._prepare([question])
        return self._pieces(request)

    def _pieces(self, request: _Running) -> Iterator[str]:
        answer = _Answer(self._engine, self.tokenizer, *request)
        with contextlib.closing(answer.pieces()) as pieces:
            yield from pieces


class _Answer:
    """One running request and the text of its answer. The constructor submits the request."""

    def __init__(self, engine: OfflineEngine, tokenizer: Tokenizer, prepared: Prepared, reader: AnswerReader) -> None:
        self._engine, self._prepared = engine, prepared
        self._detokenizer, self._router = reader.begin(tokenizer, prepared)
        self._whole = WholeText(tokenizer, prepared.ids_before, prepared.stop)  # used if there is a router
        self._deltas: list[Delta] = []
        self._id = engine.submit(prepared.prompt_ids, prepared.sampling, prepared.stopping, grammar=prepared.grammar)
        self._token_ids: list[int] = []
        self._parts: list[str] = []
        self._details: list[TokenDetails] = []
        self._prompt_details: list[TokenDetails] = []
        self._num_cached = 0
        self._finish_reason = ""
        self._stop: str | None = None

    def pieces(self) -> Generator[str]:
        """Step the engine and yield the text in non-empty pieces, as it is generated."""
        with contextlib.closing(self._engine.outputs(self._id)) as outputs:
            for output in outputs:
                if text := self._take(output):
                    yield text
                if self._finish_reason:
                    break
        if rest := self._finish():
            yield rest

    def completion(self) -> Completion:
        """Return the result. Valid after `pieces` has ended."""
        text = "".join(self._parts)
        whole = Delta(content=text) if self._router is None else fold(self._deltas)
        return Completion(
            self._prepared.prompt_ids,
            tuple(self._token_ids),
            text,
            self._finish_reason,
            self._stop,
            self._prepared.seed,
            self._num_cached,
            tuple(self._details),
            tuple(self._prompt_details),
            whole.reasoning,
            whole.content,
        )

    def abort(self) -> None:
        """Stop the generation if it still runs."""
        self._engine.abort(self._id)

    def _take(self, output: Output) -> str:
        """Record an output and return the text that it adds."""
        self._num_cached += output.num_cached
        if output.payload is not None:
            self._prompt_details += output.payload.after(len(self._prompt_details))
        text = ""
        for token_id, details in zip(output.token_ids, output.details or (None,) * len(output.token_ids), strict=True):
            self._token_ids.append(token_id)
            if details is not None:
                self._details.append(details)
            text += self._push(token_id)
            if self._stop is not None:
                self._finish_reason = "stop_sequence"
                return text
        self._finish_reason = output.finish_reason
        return text

    def _push(self, token_id: int) -> str:
        """Read a token, and return the text that may be shown."""
        piece = self._detokenizer.push(token_id)
        text, self._stop = piece.text, piece.stopped
        if (router := self._router) is not None:
            self._deltas.append(router.push(piece.text, "" if piece.text else piece.token_text))
            self._stop = router.stopped
            text = self._whole.push(token_id, router.stopped, in_reasoning=router.in_reasoning)
        self._parts.append(text)
        return text

    def _finish(self) -> str:
        """End the answer, and return the text that was held back."""
        text = self._detokenizer.finish()
        if (router := self._router) is not None:
            before = router.stopped
            self._deltas.append(router.finish())
            if router.stopped != before:
                self._finish_reason, self._stop = "stop_sequence", router.stopped
            text = self._whole.finish(self._stop)
        self._parts.append(text)
        return text


def _settings(model: str | None, options: dict[str, Any]) -> Settings:
    """Build the server's settings from `options`. Raises ArgumentError for options that `LLM` does not use."""
    for name in options:
        if name not in Settings.__struct_fields__ or name == "model_id":
            raise ArgumentError(f"LLM has no option {name!r}. Its options are those of `tokenmill serve --help`.")
        if name in _SERVER_ONLY:
            raise ArgumentError(f"{name!r} needs several processes: run `tokenmill serve`.")
    given = {} if model is None else {"model_id": str(model)}
    settings = Settings.from_env(None, **options, **given)
    try:
        return Settings.from_dict(settings.to_dict())  # checks the types
    except msgspec.ValidationError:
        why = misfit(settings.to_dict(), Settings).sentence()
        raise ArgumentError(f"An option of LLM has a wrong type: {why}.") from None


def _source(settings: Settings) -> ModelSource:
    if not settings.model_id:
        return embedded.resolve(settings.cache_dir, settings.offline, _say_nothing)
    source = hub.resolve(
        settings.model_id,
        revision=settings.revision,
        cache_dir=settings.huggingface_hub_cache,
        token=settings.hf_token,
        offline=settings.offline,
        report=_say_nothing,
    )
    return msgspec.structs.replace(source, tokenizer_config_path=settings.tokenizer_config_path)


def _chosen(options: Options | None, params: dict[str, Any]) -> Options:
    unknown = set(params) - set(Options.__struct_fields__)
    if unknown:
        name = min(unknown)
        raise ValidationError(f"There is no option {name!r} of a generation; see text.options.Options.", name)
    if isinstance(stop := params.get("stop"), str):
        params = {**params, "stop": (stop,)}
    merged = {**msgspec.structs.asdict(options or Options()), **params}
    try:
        return msgspec.convert(merged, Options)
    except msgspec.ValidationError:
        found = misfit(merged, Options)
        message = f"An option of the generation has a wrong type: {found.sentence()}."
        raise ValidationError(message, found.param) from None


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one or several prompts as a list. A string or a sequence of numbers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and not isinstance(many[0], str | Sequence) else many


def _say_nothing(progress: Progress) -> None:
    """Ignore progress, because only the server displays it."""
