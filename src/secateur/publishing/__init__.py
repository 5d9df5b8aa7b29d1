"""Publishes a model on the hub. The core works without this package."""

from __future__ import annotations

VERB = {
    "name": "push",
    "stage": "Publish a model",
    "summary": "Publish a model on the hub, with a card that has its results.",
    "recipe": "secateur.recipes.deploy:PushRecipe",
    "step": "secateur.publishing.push:push_recipe",
    "more": "The zeros are counted first. The repository is private unless --public.",
    "after": "export",
}
