"""The deviation table D1 to D32: complete, each row shown by tests that are there, and docs/deviations.md made of it.
Rows that no other test stands for are checked here."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import torch
from deviations import DEVIATIONS, VERDICTS, Deviation, document
from family import AUTOENCODER, random_weights
from flux_kit.engine.conditioning.structure import with_map
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.sampling.latents import process_in

ROOT = Path(__file__).parents[3]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_table_is_complete() -> None:
    assert [row.id for row in DEVIATIONS] == [f"D{number}" for number in range(1, 33)]
    assert all(row.checks and row.verdict in VERDICTS for row in DEVIATIONS)


@pytest.mark.parametrize("row", DEVIATIONS, ids=lambda row: row.id)
def test_every_row_is_shown_by_tests_that_are_there(row: Deviation) -> None:
    for check in row.checks:
        file, _, name = check.partition("::")
        assert name.startswith("test_") and name in names_in(file), check


def test_the_document_is_made_of_the_table() -> None:
    """`python -P docs/tools/deviations.py` writes it anew."""
    assert (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8") == document()


def test_d13_encoding_is_the_mean_and_repeats() -> None:
    """Of mean and logarithm of the variance, which the last layer of the encoder gives, the first half is taken."""
    autoencoder = Autoencoder(AUTOENCODER).requires_grad_(False)
    autoencoder.load_state_dict({name: tensor.float() for name, tensor in random_weights(
        autoencoder, 5).items()})
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = autoencoder.encoder(pixels)
    found = autoencoder.encode(pixels)
    assert moments.shape[1] == 32 and torch.equal(found, moments[:, :16])
    assert torch.equal(found, autoencoder.encode(pixels))


def test_d15_latents_are_scaled_once() -> None:
    """The conditioning holds raw latents; what the model sees is scaled and shifted by the published numbers, once."""
    z = torch.randn(1, 16, 4, 4)
    (_, values), = with_map([[torch.zeros(1, 8, 64), {}]], z, None, beside_noise=True)
    assert torch.equal(values["concat_latent_image"], z)
    torch.testing.assert_close(values["noise_concat"], process_in(z))
    torch.testing.assert_close(process_in(z), 0.3611 * (z - 0.1159))
