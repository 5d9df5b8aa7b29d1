"""Serves a model over HTTP, with OpenAI's API. The core works without this package."""

from __future__ import annotations

VERB = {
    "name": "serve",
    "stage": "Run a model",
    "summary": "Serve a model over HTTP with OpenAI's API, to several clients at once.",
    "recipe": "secateur.recipes.deploy:ServeRecipe",
    "step": "secateur.serving.serve:serve",
    "streams": True,
    "more": "Listens on 127.0.0.1 unless --host says otherwise. SIGTERM or Ctrl-C ends it "
    "when the running requests have ended. Needs the extra `serve`.",
    "after": "chat",
}
