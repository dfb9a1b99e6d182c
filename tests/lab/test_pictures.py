"""Pictures of the pages: their commands draw them, and what they say of a drawing is true."""

import pytest
import torch
from conftest import run_line

from apps import tags
from ingest import toon
from lab import cases


@pytest.mark.slow
@pytest.mark.parametrize("name", ["front", "diagram", "cases"])
def test_a_command_draws_pictures(name, tmp_path):
    figures = tmp_path / "results/figures"
    figures.mkdir(parents=True)
    run_line(f"lab.{name}", tmp_path, check=0)
    assert all(picture.stat().st_size > 50_000 for picture in figures.iterdir())
    assert len([*figures.iterdir()]) == (1 if name == "cases" else 2)


@torch.no_grad()
def test_each_true_tag_is_right_or_missed():
    tagger = tags.load_tagger(cases.RUN)
    person = toon.cast()[0]
    _, name, judged = cases.case(tagger, person)
    truth = {*toon.draw(toon.unseen(person, 1)[0])["tags"]} & {*tagger[1]["words"]}
    kinds = {tag.split()[0]: kind for tag, kind in judged}
    assert name.endswith(f"is {person['name']}") and {*kinds.values()} <= {*cases.MARKS}
    assert {tag for tag, kind in kinds.items() if kind != "wrong"} == truth
