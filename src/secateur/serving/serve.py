"""Serves a model over HTTP."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import RecipeError, install_extra
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.deploy import ServeRecipe
from secateur.recipes.options import bytes_of
from secateur.runs.environment import choose_device
from secateur.runtime.decode import SlotDecoder
from secateur.runtime.layer_forms import refuse_options, why_not
from secateur.runtime.load import load
from secateur.runtime.packed import device_for
from secateur.runtime.sampling import end_tokens, sampling_in
from secateur.runtime.speculative import open_drafter
from secateur.serving import scheduler
from secateur.serving.service import Service, Worker

if TYPE_CHECKING:
    from secateur.serving.http.app import StoppableServer

STOP_SECONDS = 30.0
"""How long running requests may go on after SIGTERM."""

GAP_SECONDS = 0.1
"""At most between two tokens of a request while prompts of others are read: it bounds the chunks
of chunked prefill."""

KEY_VARIABLE = "SECATEUR_API_KEY"
"""Environment variable with the key, which other users of the machine cannot read."""

POSITIONS = 4096
"""The room of a slot where the model has more positions and no option says otherwise."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class Serving:
    """A server that is ready: the model is in memory and the port is taken.

    Attributes:
        service: the model.
        server: answers, once it runs.
        listening: the socket.
        lines: what a person should know, one line each.
    """

    service: Service
    server: StoppableServer
    listening: socket.socket
    lines: tuple[str, ...]

    @property
    def address(self) -> str:
        """The address of the API."""
        host, port = self.listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Answer until SIGTERM, Ctrl-C or `stop`."""
        with self.listening:
            self.server.run(sockets=[self.listening])

    def stop(self) -> None:
        """End when the running requests have ended."""
        self.server.stop()


def prepare(recipe: ServeRecipe) -> Serving:
    """Load a model and take the port.

    Raises:
        SecateurError: the model cannot be loaded, the port is taken, or a package is missing.
    """
    try:
        from secateur.serving.http.app import StoppableServer, application, listening_socket
    except ImportError as error:
        raise RecipeError(
            f"the server needs packages that are not installed: {error}",
            remedy=install_extra("serve"),
        ) from error
    api_key = recipe.api_key or os.environ.get(KEY_VARIABLE)
    if api_key is not None and not api_key.strip():
        raise RecipeError(
            f"the environment variable {KEY_VARIABLE} is set, but empty",
            remedy="put the key into it, or unset it to serve without a key",
        )
    listening = listening_socket(recipe.host, recipe.port)
    try:
        service, lines = _serving(recipe)
    except BaseException:
        listening.close()
        raise
    app = application(service, api_key=api_key, stop_seconds=STOP_SECONDS)
    server = StoppableServer(app, service.worker.close, STOP_SECONDS)
    if recipe.host not in LOOPBACK and api_key is None:
        lines.append(
            f"WARNING: everybody who can reach {recipe.host} may use the model; set --api-key or "
            f"{KEY_VARIABLE}"
        )
    return Serving(service, server, listening, tuple(lines))


def _serving(recipe: ServeRecipe) -> tuple[Service, list[str]]:
    """The model of a recipe, and what a person should know of it."""
    trust, device = recipe.trust_remote_code, choose_device(recipe.device, recipe.only_cpu)
    folder = resolve(recipe.model, trust_remote_code=trust).folder
    tokenizer = load_tokenizer(folder)
    device = device_for(folder, recipe.device, device)
    defaults, model = sampling_in(folder), load(folder, device=device)
    context = recipe.context_length
    positions = getattr(model.config, "max_position_embeddings", None) or POSITIONS
    if context is not None and context > positions:
        raise RecipeError(
            f"--context-length {context}, and the model has {positions} positions",
            where="--context-length",
            remedy=f"give at most {positions}",
        )
    capacity = context or min(positions, POSITIONS)
    engine, line = _engine_of(model, capacity, recipe)
    drafter = None
    if recipe.draft is not None and isinstance(engine, SlotDecoder):
        draft = resolve(recipe.draft, trust_remote_code=trust).folder
        drafter = open_drafter(draft, folder, engine, tokenizer)
    order = scheduler.Scheduler(
        engine,
        queue_limit=recipe.queue,
        prefixes=scheduler.PrefixCache(bytes_of(recipe.prefix_cache) if engine.together > 1 else 0),
        drafter=drafter,
        gap_seconds=GAP_SECONDS,
        most_piece=scheduler.MOST_PIECE if engine.together > 1 else capacity,
    )
    eos = tokenizer.eos_token_id
    service = Service(
        name=recipe.name or Path(recipe.model.partition("@")[0]).resolve().name,
        tokenizer=tokenizer,
        worker=Worker(order),
        capacity=capacity,
        vocabulary=min(len(tokenizer), model.config.get_text_config().vocab_size),
        ends=end_tokens(model) | ({eos} if eos is not None else set()),
        defaults={"temperature": 1.0} | defaults,
        time_limit_seconds=recipe.request_seconds,
    )
    lines = [line]
    if defaults:
        taken = ", ".join(f"{name} {value}" for name, value in defaults.items())
        lines.append(f"from the model's generation_config.json: {taken}")
    if not getattr(tokenizer, "chat_template", None):
        lines.append("the model has no chat template, so only /v1/completions answers")
    return service, lines


def _engine_of(model: Any, capacity: int, recipe: ServeRecipe) -> tuple[scheduler.Engine, str]:
    """What computes, and a line about it."""
    reason, slots = why_not(model, capacity), recipe.slots
    if reason is not None:
        refuse_options(reason, kv_cache=recipe.kv_cache, draft=recipe.draft)
        line = f"one request at a time, through transformers, because {reason}"
        return scheduler.TransformersEngine(model, capacity), line
    decoder = SlotDecoder(model, capacity, slots, cache=recipe.kv_cache)
    most = decoder.cache.nbytes / 2**20
    return decoder, (
        f"up to {slots} requests at once, {capacity} tokens each; their keys and values take at "
        f"most {most:.0f} MiB"
    )


def serve(recipe: ServeRecipe, *, as_json: bool) -> None:
    """Serve a model until SIGTERM or Ctrl-C."""
    serving = prepare(recipe)
    for line in serving.lines:
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps({"address": serving.address}), flush=True)
    print(f"listening on {serving.address}/v1; Ctrl-C ends it", file=sys.stderr, flush=True)
    serving.run()
