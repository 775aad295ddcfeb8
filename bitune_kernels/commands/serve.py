"""``bitune serve``: an OpenAI-compatible endpoint. The server is transformers' own; it gets the model from here."""

from __future__ import annotations

import json
import socket
import sys
from math import inf
from pathlib import Path

from .load import (
    add_model_options,
    at_least_one,
    end_tokens,
    load_model,
    load_tokenizer,
    max_tokens,
    number,
    warn_of_chats,
)

GRACE = 3  # seconds that answers in the making get when the server is to stop

# What transformers' server logs and reads over, with the values that ask for nothing else than it gives.
SERVED = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "text": (None, {}, {"format": {"type": "text"}}),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "tool_choice": (None, "none", "auto"),
    "prediction": (None,),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "previous_response_id": (None,),
    "background": (None, False),
}


def add(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible endpoint",
        description="Serves /v1/chat/completions (the whole conversation is the prompt), /v1/completions and "
        "/v1/responses by the server of transformers. Requests are answered one after the other.",
        epilog="example: bitune serve --model google/gemma-2b-it --adapter runs/answers --port 8000",
    )
    add_model_options(parser)
    parser.add_argument("--name", help="of the model in requests; default: the name of the folder in --adapter")
    parser.add_argument("--host", default="localhost", help="default: localhost")
    port = number(int, lambda x: 0 <= x < 65536, "a port, 0 to 65535")
    parser.add_argument("--port", type=port, default=8000, help="default: 8000; 0: a free one")
    parser.add_argument(
        "--limit", type=at_least_one, default=64, help="connections at a time; more get 503 (default: 64)"
    )
    parser.set_defaults(run=_run)


def _run(given) -> None:
    name = given.name or Path(given.adapter).resolve().name
    try:
        import uvicorn
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
        from jinja2 import TemplateError
        from starlette.exceptions import HTTPException
        from transformers.cli.serving import chat_completion, completion, response, server
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.utils import GenerateManager, GenerationState
    except ImportError as error:
        raise ValueError(f"serve: expected transformers[serving], got {error}") from None
    try:  # here, since the model takes long to load
        family = socket.AF_INET6 if ":" in given.host else socket.AF_INET  # as uvicorn takes a host
        socket.create_server((given.host, given.port), family=family).close()
    except OSError as error:
        raise ValueError(f"--host, --port: expected a free port, got {given.host}:{given.port}; {error}") from None
    tokenizer, limit = load_tokenizer(given), max_tokens(given)
    warn_of_chats(given)
    model = load_model(given)
    model.generation_config.eos_token_id = end_tokens(model, tokenizer)

    class Models(ModelManager):
        """Knows one model, whatever it is asked for."""

        @staticmethod
        def process_model_name(model_id):
            return name  # as answers have it; without a revision, since it isn't the hub's

        def _load_processor(self, *args, **kwargs):
            return tokenizer

        def _load_model(self, *args, **kwargs):
            return model

        @staticmethod
        def get_gen_models(cache_dir=None):
            return [{"id": name, "object": "model", "owned_by": "bitune", "created": 0}]

    class Answers(GenerateManager):
        """Makes none that the model wasn't made for."""

        def generate_streaming(self, model, processor, inputs, gen_config, **options):
            self._check(inputs, gen_config)
            return super().generate_streaming(model, processor, inputs, gen_config, **options)

        async def generate_non_streaming(self, model, processor, inputs, gen_config, **options):
            self._check(inputs, gen_config)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, **options)

        def _check(self, inputs, gen_config) -> None:
            # here, since what generate() raises in a stream comes behind the status
            gen_config.validate()
            stop = gen_config.stop_strings
            if stop is not None and not (stop and all(isinstance(text, str) and text for text in stop)):
                raise ValueError(f"stop: expected a text or a list of texts, got {stop!r}")
            asked, length = gen_config.max_new_tokens, inputs["input_ids"].shape[-1]
            if limit is None:
                return
            if length >= limit:
                raise ValueError(f"prompt: expected fewer than the {limit} tokens of the model, got {length}")
            gen_config.max_new_tokens = limit - length if asked is None else min(asked, limit - length)

    class State(GenerationState):
        def get_manager(self, model_id, use_cb=False):
            return answers

    class Checked:
        """Before a handler of transformers: refuses what that would read over, and samples where it is asked to."""

        async def handle_request(self, body, request_id):
            for field, values in SERVED.items():
                if body.get(field) not in values:
                    expected = " or ".join(json.dumps(value) for value in values if value is not None) or "none"
                    raise ValueError(f"{field}: expected {expected}, all that is served, got {json.dumps(body[field])}")
            return await super().handle_request(body, request_id)

        def _build_generation_config(self, body, *args, **options):
            # transformers' samples where the model's own config says so, and otherwise reads over both
            config = super()._build_generation_config(body, *args, **options)
            for field, limit in (("temperature", inf), ("top_p", 1)):
                if body.get(field) is None:
                    continue
                if not 0 <= float(body[field]) <= limit:
                    raise ValueError(f"{field}: expected a number from 0 to {limit}, got {body[field]}")
                config.do_sample = config.temperature != 0
            return config

    class Chats(Checked, chat_completion.ChatCompletionHandler):
        pass

    class Completions(Checked, completion.CompletionHandler):
        pass

    class Responses(Checked, response.ResponseHandler):
        """Streams where it is asked to, as OpenAI's does; transformers' streams unless it is told not to."""

        async def handle_request(self, body, request_id):
            return await super().handle_request({"stream": False} | body, request_id)

    class Refused:
        async def handle_request(self, *args):
            raise HTTPException(status_code=404, detail="not served with a Bitune model")

    models, state, answers = Models(device=str(model.device), model_timeout=-1), State(), Answers()
    models.force_model = name  # what a request may ask for; as an argument it would be loaded from the hub
    app = server.build_server(
        models,
        Chats(models, state),
        completion_handler=Completions(models, state),
        response_handler=Responses(models, state),
        transcription_handler=Refused(),
        systemone_handler=Refused(),
        generation_state=state,
    )

    async def wrong_request(request, error):
        known = isinstance(error, ValueError | HTTPException)
        what = "" if known else f"expected a request of OpenAI's API, {type(error).__name__}: "
        body = {"message": f"{what}{getattr(error, 'detail', error)}", "type": "invalid_request_error"}
        # as OpenAI's clients read it
        return JSONResponse({"error": body}, status_code=getattr(error, "status_code", 400))

    for kind in (ValueError, TypeError, KeyError, TemplateError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, wrong_request)
    # uvicorn counts the connection that asks, and refuses from this number on
    options = dict(limit_concurrency=given.limit + 1, timeout_graceful_shutdown=GRACE, log_level="info")
    print(f"bitune: serving the model {name!r}", file=sys.stderr)
    uvicorn.run(app, host=given.host, port=given.port, **options)
