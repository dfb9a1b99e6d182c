"""The quick looks of common/evaluate.py at vectors whose answer is known."""

import pytest
import torch

from common import evaluate


def looked_at(vectors):
    """vectors {split name: (n, D)} as `features` of evaluate.recognition: the same for both that
    look.
    """
    return lambda split, rows: (vectors[split["name"]][rows],) * 2


def split_of(name, labels):
    return {"name": name, "images": labels, "labels": labels}


@pytest.fixture
def labels():
    return torch.arange(300) % 3, torch.arange(90) % 3


def test_a_direction_that_tells_the_class_is_found_under_noise_by_the_line_alone(labels):
    g = torch.Generator().manual_seed(0)
    train, held = (
        torch.cat([5 * torch.randn(len(y), 20, generator=g), torch.eye(3)[y]], 1) for y in labels
    )
    found = evaluate.recognition(
        looked_at({"train": train, "held": held}),
        split_of("train", labels[0]),
        split_of("held", labels[1]),
    )
    assert found["linear"] == 100 and found["knn"] < 70


def test_vectors_without_a_class_are_near_chance(labels):
    g = torch.Generator().manual_seed(0)
    noise = {"train": torch.randn(300, 8, generator=g), "held": torch.randn(90, 8, generator=g)}
    found = evaluate.recognition(
        looked_at(noise), split_of("train", labels[0]), split_of("held", labels[1])
    )
    assert all(15 < found[head] < 52 for head in ("knn", "linear")) and 7 < found["mean_rank"] <= 8
