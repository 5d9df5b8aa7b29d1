"""What goes to the hub, what must not, and the calls of the hub's client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import yaml
from commands import Outcome
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import secateur as package
from secateur.errors import CheckpointError, RecipeError, SecateurError, SourceError
from secateur.errors import VerificationError as Lost
from secateur.reporting.cards import split_card

REPO = "someone/small-pruned"
TOKEN = "hf_" + "a1B2" * 9


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder of a model with a licence, evaluated on a text."""
    place = tmp_path_factory.mktemp("push")
    save_tiny(place / "dense", num_hidden_layers=2)
    (place / "dense" / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: org/dense\nlanguage: en\n---\n# Dense\n"
    )
    (place / "dense" / "LICENSE").write_text("the licence")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    package.prune(
        place / "dense", output=place / "pruned", method="wanda", sparsity=0.5,
        calibration=str(place / "text.txt"), windows=4, sequence_length=16,
    )  # fmt: skip
    package.evaluate(place / "pruned", text=str(place / "text.txt"), sequence_length=16, windows=4)
    return place / "pruned"


@pytest.fixture
def copied(pruned: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    import shutil

    return Path(shutil.copytree(pruned, tmp_path / "model"))


class Hub:
    """A hub in memory: the real client's signatures, and the files that were sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, private: bool = True) -> None:
        self.api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
        self.sent: dict[str, bytes] = {}
        self.api.repo_info.return_value = SimpleNamespace(private=private)
        self.api.create_commit.side_effect = self.take
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self.api)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        monkeypatch.setattr("secateur.publishing.push.why_unreachable", lambda: None)

    def take(self, repo: str, operations: list[Any], **rest: Any) -> Any:
        for one in operations:
            with one.as_file() as content:
                self.sent[one.path_in_repo] = content.read()
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_everything_of_the_model_is_sent_and_nothing_else(hub: Hub, copied: Path) -> None:
    (copied / "notes of mine.docx").write_bytes(b"private")
    (copied / ".env").write_text("SECRET=1")
    result = package.push(copied, REPO)
    own = {"config.json", "model.safetensors", "README.md", "LICENSE", "tokenizer.json"}
    assert own <= hub.sent.keys()
    assert {"secateur/manifest.json", "secateur/evaluation.json"} <= hub.sent.keys()
    assert set(result.left_out) == {
        "notes of mine.docx", ".env", "secateur/windows.safetensors", "secateur/run.json",
    }  # fmt: skip
    assert hub.sent.keys().isdisjoint(result.left_out)
    assert hub.sent["model.safetensors"] == (copied / "model.safetensors").read_bytes()
    assert {name: len(data) for name, data in hub.sent.items()} == result.files
    assert result.address == "https://hub/commit/1"
    hub.api.create_repo.assert_called_once_with(
        REPO, private=True, repo_type="model", exist_ok=True
    )
    hub.api.create_branch.assert_not_called()
    assert hub.api.create_commit.call_args.kwargs["revision"] is None


def test_no_folder_of_this_machine_is_sent(hub: Hub, copied: Path, tmp_path: Path) -> None:
    recipe = copied / "secateur" / "recipe.yaml"
    before = recipe.read_bytes()
    assert b"/push0/" in before
    result = package.push(copied, REPO)
    assert not [name for name, data in hub.sent.items() if b"/push0/" in data]
    assert b"source: text.txt\n" in hub.sent["secateur/recipe.yaml"]
    [note] = [note for note in result.notes if "last names" in note]
    assert "secateur/recipe.yaml" in note
    assert recipe.read_bytes() == before


def test_a_base_model_can_be_named(hub: Hub, copied: Path) -> None:
    card = copied / "README.md"
    card.write_text(card.read_text().replace("base_model: org/dense\n", ""))
    assert "--base-model OWNER/NAME" in package.push(copied, REPO, dry_run=True).notes[0]
    result = package.push(copied, REPO, base_model="org/other", dry_run=True)
    assert "base_model: org/other\n" in result.card
    assert not [note for note in result.notes if "base model" in note]


@pytest.mark.parametrize("names", [("noslash", None), (REPO, "noslash"), (REPO, "a/b/c")])
def test_a_repository_has_an_owner(copied: Path, names: tuple[str, str | None]) -> None:
    repo, base = names
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        package.push(copied, repo, base_model=base, dry_run=True)


def test_the_card_has_results_with_protocols_and_the_licence(hub: Hub, pruned: Path) -> None:
    result = package.push(pruned, REPO, public=True, branch="v1")
    front, body = split_card(hub.sent["README.md"].decode())
    data = yaml.safe_load(front.strip("-\n"))
    assert (data["license"], data["base_model"], data["language"]) == (
        "apache-2.0", "org/dense", "en",
    )  # fmt: skip
    assert {"pruned", "sparse", "secateur"} <= set(data["tags"])
    measured = json.loads((pruned / "secateur" / "evaluation.json").read_text())["perplexity"][0]
    (model,) = data["model-index"]
    assert model["name"] == "small-pruned"
    metric = model["results"][0]["metrics"][0]
    assert metric["value"] == pytest.approx(measured["perplexity"])
    assert measured["protocol_id"] in metric["name"]
    assert measured["protocol_id"] in body
    assert "## Quality" in body
    assert huggingface_hub.ModelCard(hub.sent["README.md"].decode()).data.eval_results
    assert (pruned / "README.md").read_text() != hub.sent["README.md"].decode()
    assert not [note for note in result.notes if "licence" in note]
    hub.api.create_repo.assert_called_once_with(
        REPO, private=False, repo_type="model", exist_ok=True
    )
    hub.api.create_branch.assert_called_once_with(
        REPO, branch="v1", repo_type="model", exist_ok=True
    )
    assert hub.api.create_commit.call_args.kwargs["revision"] == "v1"


def test_a_dry_run_sends_nothing_and_shows_everything(
    secateur: Callable[..., Outcome], pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*words: object, **options: object) -> None:
        raise AssertionError("a dry run used the network")

    monkeypatch.setattr("socket.create_connection", never)
    monkeypatch.setattr("huggingface_hub.HfApi", never)
    before = sorted(file.stat().st_mtime_ns for file in pruned.rglob("*"))
    done = secateur("push", pruned, REPO, "--dry-run")
    assert done.code == 0, done.err
    for said in ("would be published", "private", "model.safetensors", "license: apache-2.0"):
        assert said in done.out
    assert "dry run" in done.out
    assert sorted(file.stat().st_mtime_ns for file in pruned.rglob("*")) == before
    found = json.loads(secateur("push", pruned, REPO, "--dry-run", "--json").out)
    assert found["address"] is None
    assert found["files"]["model.safetensors"] == (pruned / "model.safetensors").stat().st_size
    assert found["zeros"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_packed_and_imported_folders_go_too(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    package.compress(pruned, output=tmp_path / "small", values="int8")
    package.push(tmp_path / "small", REPO)
    assert "secateur.safetensors" in hub.sent
    assert "license: apache-2.0" in hub.sent["README.md"].decode()
    package.import_model(pruned, output=tmp_path / "imported")
    package.push(tmp_path / "imported", REPO)
    assert "secateur/import.json" in hub.sent


@pytest.mark.parametrize("records", ["layers.jsonl", "import.json"])
def test_a_folder_that_lost_zeros_is_refused(
    records: str, hub: Hub, copied: Path, tmp_path: Path
) -> None:
    folder = copied
    if records == "import.json":
        package.import_model(copied, output=tmp_path / "imported")
        folder = tmp_path / "imported"
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][tuple((tensors[name] == 0).nonzero()[0])] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Lost, match="1 zeros") as raised:
        package.push(folder, REPO)
    assert raised.value.where == name.removesuffix(".weight")
    hub.api.create_repo.assert_not_called()


def secret(folder: Path) -> None:
    (folder / "secateur" / "recipe.yaml").write_text(f"a: 1\ntoken: {TOKEN}\n")


def link(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").symlink_to("/etc/hostname")


def unfinished(folder: Path) -> None:
    (folder / "run.json").write_text("{}")


SPOILED: dict[str, tuple[Callable[[Path], object], type[SecateurError], str]] = {
    "a token": (secret, Lost, "a token of the hub"),
    "a link": (link, CheckpointError, "link out of the folder"),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), CheckpointError, "no model"),
    "no card": (lambda x: (x / "README.md").unlink(), CheckpointError, "no card"),
    "no config": (lambda x: (x / "config.json").unlink(), CheckpointError, r"config\.json"),
    "a run": (unfinished, RecipeError, "has not finished"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_what_must_not_be_published_is_refused(fault: str, hub: Hub, copied: Path) -> None:
    spoil, kind, said = SPOILED[fault]
    spoil(copied)
    with pytest.raises(kind, match=said) as raised:
        package.push(copied, REPO)
    assert TOKEN not in str(raised.value)
    if fault == "a token":
        assert raised.value.where == "secateur/recipe.yaml:2"
    hub.api.create_repo.assert_not_called()


@pytest.mark.parametrize(
    "text",
    [
        TOKEN, "ghp_" + "x" * 36, "sk-" + "y" * 40, "AKIA" + "Z" * 16, "xoxb-1234567890-abc",
        "-----BEGIN OPENSSH PRIVATE KEY-----", "https://me:word@host/x",
    ],
)  # fmt: skip
def test_every_kind_of_secret_is_found(text: str) -> None:
    from secateur.publishing.push import secrets_in

    assert len([*secrets_in("file", f"one\n  {text} more")]) == 1
    assert not [*secrets_in("file", "hf_model, sk-learn, https://host:80/path@v2, AKIA")]


def test_work_folders_and_names_are_refused(hub: Hub, copied: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    copied.rename(partial / "model")
    with pytest.raises(RecipeError, match="has not finished"):
        package.push(partial / "model", REPO)
    with pytest.raises(RecipeError, match="no such folder"):
        package.push(tmp_path / "nowhere", REPO)
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        package.push(partial / "model", "a/b/c")


def test_a_public_repository_is_not_taken_for_a_private_one(
    monkeypatch: pytest.MonkeyPatch, pruned: Path
) -> None:
    hub = Hub(monkeypatch, private=False)
    with pytest.raises(RecipeError, match="public"):
        package.push(pruned, REPO)
    hub.api.create_commit.assert_not_called()
    package.push(pruned, REPO, public=True)
    hub.api.create_commit.assert_called_once()


def test_offline_and_without_a_login_it_says_so(
    hub: Hub, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SourceError, match="logged in") as raised:
        package.push(pruned, REPO)
    assert "hf auth login" in str(raised.value.remedy)
    monkeypatch.setattr("secateur.publishing.push.why_unreachable", lambda: "no route")
    with pytest.raises(SourceError, match=r"no route") as raised:
        package.push(pruned, REPO)
    assert "dry_run" in str(raised.value.remedy)
    hub.api.create_repo.assert_not_called()


def test_what_the_hub_refuses_becomes_an_error(hub: Hub, pruned: Path) -> None:
    import httpx

    request = httpx.Request("POST", "https://hub/api/repos/create")
    response = httpx.Response(403, request=request)
    hub.api.create_repo.side_effect = HfHubHTTPError(
        "403", response=response, server_message="no right"
    )
    with pytest.raises(SourceError, match="no right"):
        package.push(pruned, REPO)


def test_a_card_without_a_licence_is_noted(hub: Hub, copied: Path) -> None:
    card = (copied / "README.md").read_text().replace("license: apache-2.0\n", "")
    (copied / "README.md").write_text(card)
    (copied / "secateur" / "import.yaml").write_text("model: /home/me/model\n")
    notes = package.push(copied, REPO).notes
    assert any("licence" in note for note in notes)
    assert any("secateur/import.yaml" in note for note in notes)
