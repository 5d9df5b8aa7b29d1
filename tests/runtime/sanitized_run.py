"""What test_sanitizer.py runs in a process of its own: `python sanitized_run.py PART FOLDER`."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

import secateur
from runtime.kernel_examples import TIERS
from runtime.packed_examples import LAYOUTS, SMALL_GRIDS, packed_folder
from runtime.test_hostile_files import DAMAGES, FORGERIES
from secateur.errors import CheckpointError, KernelError
from secateur.models.draft_head import DraftHead, head_config
from secateur.quantization.groups import GROUPS, Scales
from secateur.recipes.deploy import Sampling
from secateur.runtime import decode
from secateur.runtime.decode import Decoder, SlotDecoder, Token
from secateur.runtime.formats import Layout, formats
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.heads import HeadDecoder
from secateur.runtime.install import matrix_of
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels import matrix as matrices
from secateur.runtime.kernels.dispatch import by_blocks
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.packed import PackedCheckpoint
from secateur.runtime.sampling import Chances, Draws

SHAPES = ((1, 1), (2, 63), (5, 64), (3, 65), (33, 130), (7, 577), (6, 700), (4, 1000))
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
HOSTILE_FILES = 200
HOSTILE_BIT_STREAMS = 1000


def tiers() -> Iterator[str]:
    """All that this processor has, each made the active one."""
    for tier in TIERS:
        try:
            lib.use_tier(tier)
        except KernelError:
            continue
        yield tier


def random_matrix(
    rows: int, columns: int, values: torch.dtype, sparsity: float | None
) -> KernelMatrix:
    weight = torch.randn(rows, columns) * 50
    stored = weight.clamp(-127, 127).to(values)
    scale = torch.rand(rows) if values == torch.int8 else None
    if sparsity is None:
        return KernelMatrix(stored, scale=scale)
    mask = torch.rand(rows, columns) >= sparsity
    return KernelMatrix(stored[mask], bitmask=pack_bits(mask), scale=scale, columns=columns)


def random_codes(rows: int, columns: int, group: int, sparsity: float | None) -> KernelMatrix:
    codes = torch.randint(-7, 8, (rows, columns)).to(torch.int8)
    code = torch.randint(0, 256, (rows, -(-columns // group))).to(torch.uint8)
    scales = Scales(torch.randint(-20, 20, (rows,)).to(torch.int8), code)
    kept = None if sparsity is None else torch.rand(rows, columns) >= sparsity
    if kept is not None and sparsity == 0.5 and columns > 500:
        column = torch.arange(columns) % 4  # two of four, in each row others than in the one before
        kept = (column < 2) == (torch.arange(rows) % 2 == 0)[:, None]
    return KernelMatrix.of_codes(codes, scales, group, kept)


def multiply_in_all_ways(matrix: KernelMatrix) -> None:
    """Every batch in both dtypes, numbers that are none, and tiles."""
    for batch in range(1, lib.MAX_BATCH + 1):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(batch, matrix.columns).to(dtype)
            matrix.multiply(x)
            x[0, 0], x[-1, -1] = float("nan"), float("-inf")
            matrix.multiply(x)
    matrix.multiply(torch.zeros(1, matrix.columns))
    for tokens in (1, 9, 34):
        by_blocks(matrix, torch.randn(tokens, matrix.columns))
        by_blocks(matrix, torch.randn(tokens, matrix.columns).bfloat16())
    if matrix.rows > 2:
        matrix.tile(1, matrix.rows - 1)


def products() -> None:
    """All kernels over shapes that fill no register evenly."""
    for _ in tiers():
        for shape in SHAPES:
            for values in VALUES:
                for sparsity in (None, 0.0, 0.5, 1.0):
                    multiply_in_all_ways(random_matrix(*shape, values, sparsity))
            for group in GROUPS:
                for sparsity in (None, 0.0, 0.5, 1.0):
                    multiply_in_all_ways(random_codes(*shape, group, sparsity))


def decoding(folder: Path) -> None:
    """Some tokens of small models, in all tiers, on several threads."""
    from runtime.packed_models import packed_model

    drawing()
    sizes = {"head_dim": 16, "hidden_size": 100, "intermediate_size": 150}
    for values in ("float32", "bfloat16", "int8", "int4"):
        packed_model(
            folder / values, values=values, embeddings="int8" if values == "int8" else "auto",
            **sizes,
        )  # fmt: skip
        for _ in tiers():
            for dtype in (torch.float32, torch.bfloat16):
                model = secateur.load(folder / values / "packed", dtype=dtype)
                for threads in (1, 3):
                    lib.library().sct_set_threads(threads)
                    for cache in (None, "int8"):
                        decoder = Decoder(model, 80, cache=cache)  # more than a tile of keys
                        decoder.prefill(torch.arange(75))
                        while decoder.length < decoder.capacity:
                            decoder.step(7)
                    several = SlotDecoder(model, 3, slots=8, taps=(0, 1, 3))
                    for at in range(3):
                        several.step([Token(slot, at, 5 + slot, slot > 2) for slot in range(8)])
                    heads(several, values)
    windowed = packed_model(
        folder / "windowed", "mistral", values="int8", sliding_window=70,
        max_position_embeddings=1400, **sizes,
    )  # fmt: skip
    for cache in (None, "int8"):  # a ring, more than once around
        decoder = Decoder(secateur.load(windowed), 1400, cache=cache, continues=True)
        for length in (1390, 900, 1390):
            decoder.prefill(torch.arange(length) % 90)
            while decoder.length < length + 9:
                decoder.step(7)
        assert decoder.slots.copy_out(0, 1300, 1399) is not None


def drawing() -> None:
    """Tokens of vocabularies of any size, and what is left of them after those of a draft."""
    for _ in tiers():
        for count in (1, 15, 511, 513, 1300):
            for options in ({}, {"top_k": 7}, {"top_p": 0.9}):
                draws = Draws(Sampling(temperature=1.0, **options))
                logits, ids = torch.randn(2, count), torch.arange(0, count, 3)
                p = Chances(draws, logits[0].numpy().copy())
                q = Chances(draws, logits[1][ids].numpy(), ids.numpy())
                tokens = {q.draw(), p.draw(), p.draw(less=q), p.token, count - 1}
                assert all(0 <= p.of(token) <= 1 and token < count for token in tokens)


def heads(parent: SlotDecoder, values: str) -> None:
    """A draft head beside a parent that has read a few tokens: a prompt, and a chain."""
    head = DraftHead(head_config(parent.model.config), (0, 1, 3), torch.arange(1, 96, 2))
    states = parent.take_states(1)[1]
    decoder = HeadDecoder(head, parent, values)
    for slot in range(2):
        decoder.give(slot, states)
        decoder.read(slot, torch.tensor([6, 7]))
        decoder.step([Token(slot, 2, 8)])
        decoder.rewind(slot, 1)
    decoder.step([Token(slot, 1, 8, slot > 0) for slot in range(2)])


def hostile(folder: Path, layouts: Mapping[str, Layout], files: int) -> None:
    """Forged files: what is not refused is multiplied; int4 and int3 expand to what they are."""
    packed_folder(folder / "whole", layouts=layouts)
    multiplied = 0
    for seed in range(files):
        draw = random.Random(seed)
        shutil.copytree(folder / "whole", folder / "mutated")
        damage = draw.choice(FORGERIES if draw.random() < 0.8 else DAMAGES)
        damage(draw, draw.choice(sorted((folder / "mutated").glob("*.safetensors"))))
        try:
            packed = PackedCheckpoint(folder / "mutated")
            for name, layout in packed.layouts.items():
                parts = packed.parts(name)
                matrix = matrix_of(parts, layout)
                for _ in tiers():
                    matrix.multiply(torch.randn(3, matrix.columns))
                    tile = matrix.tile(0, matrix.rows)
                    if layout.grid is not None:
                        expected = formats[layout.format].unpack(parts, layout)
                        assert torch.equal(tile.float(), expected), (seed, name)
                multiplied += 1
        except CheckpointError:
            pass
        shutil.rmtree(folder / "mutated")
    assert multiplied > files // 2, multiplied


def main(part: str, folder: Path) -> None:
    torch.manual_seed(0)
    decode.unused_zeros = lambda shape: torch.zeros(shape, dtype=torch.uint8)  # guarded
    info = lib.kernel_info()
    assert info.tier != "none", info
    if part == "unpadded":
        matrices.READ_AHEAD_BYTES = 0
        products()
    elif part == "products":
        products()
    elif part == "decoding":
        decoding(folder)
    elif part == "hostile":
        hostile(folder, LAYOUTS, HOSTILE_FILES)
    else:
        hostile(folder, SMALL_GRIDS, HOSTILE_BIT_STREAMS)
    print("came to the end")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
