"""Test-time augmentation: the mean by definition, its geometry proved, tiles equal to the whole."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import nn

from tilepipe.errors import GeometryError
from tilepipe.predict.prepare import prepare
from tilepipe.proof import prove
from tilepipe.trace import geometry_of
from tilepipe.variants.augment import Augmented, augmented_geometry


def by_definition(network, image, group, task):
    """The mean over explicitly turned images."""
    total, count = 0, 0
    for transpose in (False, True) if group == "d4" else (False,):
        for rows in (False, True):
            for cols in (False, True):
                axes = [axis for axis, turned in ((2, rows), (3, cols)) if turned]
                turned = image.transpose(2, 3) if transpose else image
                scores = network(turned.flip(axes) if axes else turned)
                scores = torch.softmax(scores, 1) if task == "segmentation" else scores
                scores = scores.flip(axes) if axes else scores
                total, count = total + (scores.transpose(2, 3) if transpose else scores), count + 1
    return total / count


@pytest.mark.parametrize("group", ["flips", "d4"])
@pytest.mark.parametrize("task", ["segmentation", "regression"])
def test_the_result_is_the_mean_over_turned_images(group, task):
    network = networks.seeded(networks.SegNetBasicShape).double()
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        found = Augmented(network, group, task)(image)
        expected = by_definition(network, image, group, task)
        folded = prepare(Augmented(network, group, task), "float64")(image)
    shares = torch.softmax(found, 1) if task == "segmentation" else found
    assert torch.allclose(shares, expected, atol=1e-12)
    assert torch.allclose(folded, found, atol=1e-9)


def test_batch_normalisation_is_still_folded():
    network = networks.seeded(lambda: networks.SegNetShape(width=2))
    assert prepare(Augmented(network, "d4")).unfolded == 0


SYMMETRIC = ["autoencoder", "lenet", "skip", "parallel", "dilated", "shuffle", "last-dims"]
FLIPPED = [*SYMMETRIC, "valid-unet", "oblong", "skip-oblong", "in-place", "ceil-mode", "self-padding", "bilinear"]


@pytest.mark.parametrize(
    ("name", "group"), [*((name, "flips") for name in FLIPPED), *((name, "d4") for name in SYMMETRIC)]
)
def test_the_derived_geometry_is_proved_on_the_network(name, group):
    make, channels = networks.EXACT[name]
    network = networks.seeded(make)
    derived = augmented_geometry(geometry_of(network, channels), group)
    proof = prove(Augmented(network, group, "regression"), derived)
    assert proof.ok, proof


def test_one_step_less_reach_breaks_it():
    network = networks.seeded(networks.lenet)
    plain = geometry_of(network, 1)
    derived = augmented_geometry(plain, "flips")
    assert derived.rows.reach == (0, 24)

    class OneSided(nn.Module):
        """Looks 5 pixels to the left and up, and not to the right."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 6)

        def forward(self, x):
            return self.conv(nn.functional.pad(x, (5, 0, 5, 0)))

    one = networks.seeded(OneSided)
    narrow = geometry_of(one, 1)
    assert narrow.rows.reach == (5, 0)
    assert augmented_geometry(narrow, "flips").rows.reach == (5, 5)
    assert prove(Augmented(one, "flips", "regression"), augmented_geometry(narrow, "flips")).ok
    assert not prove(Augmented(one, "flips", "regression"), narrow).ok


def test_what_cannot_be_turned_is_refused():
    oblong = geometry_of(networks.seeded(networks.Oblong), 2)
    with pytest.raises(GeometryError, match=r"rows \(2n\).*--tta flips"):
        augmented_geometry(oblong, "d4")
    lopsided = geometry_of(nn.Conv2d(1, 2, 4), 1)  # trims 1 or 2 pixels more at one end
    with pytest.raises(GeometryError, match="--tta is not possible"):
        augmented_geometry(lopsided, "flips")
