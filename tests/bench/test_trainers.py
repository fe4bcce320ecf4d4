"""Trainers that others wrote: one gradient with our tangents inside, and what they cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import ROOT
from bench.networks import trainers
from bench.networks.trainers import LIMIT, TRAINERS, Given, gradients, losses
from bench.rows import read
from mfmjt import kernels
from mfmjt.errors import InputError
from tests.kernels.accelerated import math_attention, products
from tests.support.peers import load_torchvision

everywhere = pytest.mark.parametrize("name", TRAINERS)


def given(name, dtype=torch.float32, batch=4, ratio=0.5):
    torch.manual_seed(0)
    trainer = TRAINERS[name]
    if name in ("diffusers", "bert"):
        load_torchvision()  # which both import
        pytest.importorskip("transformers" if name == "bert" else name)
    work = Given.draw(trainer, trainer.network(True).to(dtype), batch, ratio, small=True)
    moved = {key: getattr(work, key).to(dtype) for key in ("x", "noise", "r", "t")}
    cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in work.cond.items()}
    return trainer, dataclasses.replace(work, **moved, cond=cond)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@everywhere
def test_one_loss_and_one_gradient(name, ratio):
    """In float64, where roundings are far below what a wrong factor or sign would do."""
    trainer, work = given(name, torch.float64, ratio=ratio)
    ways = losses(trainer, work)
    value, right = gradients(work, ways["original"])
    near = torch.finfo(torch.float64).eps ** 0.5
    found, inside = gradients(work, ways["with"])
    assert abs(found - value) <= near * abs(value)
    assert trainers.apart(inside, right) <= near
    assert trainers.apart(gradients(work, ways["loss"])[1], right) <= near
    if ratio > 0:  # what is told apart
        assert trainers.apart(gradients(work, ways["plain"])[1], right) > LIMIT


@everywhere
def test_every_call_is_taken(name):
    """Nothing is left to PyTorch, and no product with a weight is computed a third time."""
    trainer, work = given(name)
    z, v = work.path()

    def dual():
        def u(z, t):
            return trainer.velocity(work.net, z, work.r, t, **work.cond)

        return torch.func.jvp(u, (z, work.t), (v, torch.ones_like(work.t)))

    def inside():
        with kernels.accelerate_jvp() as report:
            dual()
        assert report.taken
        assert report.left == {}

    def pytorchs():
        with math_attention():
            dual()

    forward = products(lambda: trainer.plain(work))
    assert products(inside) <= 2 * forward < products(pytorchs)


@everywhere
def test_rows(name):
    """Of saved bytes, too: those of plain training, and of SiT's two passes for two."""
    trainer, work = given(name)
    rows = {row["provider"]: row for row in trainers.measured(trainer, work, 0.0, least=1)}
    assert rows.keys() == {"plain", "original", "with", "loss"}
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["n"] == 1
        assert row["cpu_faster"] > 0
    passes = 2 if name == "sit" else 1
    assert rows["loss"]["saved_over_plain"] <= 1.1
    assert rows["with"]["saved_over_plain"] <= 1.1 * passes
    assert rows["original"]["saved_over_plain"] > 1.5 * passes


def test_a_wrong_gradient_is_not_timed():
    trainer, work = given("sit")
    wrong = dataclasses.replace(trainer, scale=lambda elements: 2.001)
    (row,) = trainers.measured(wrong, work, 0.0, least=1)
    assert row["status"] == "wrong"
    assert row["gradients_apart"] == pytest.approx(5e-4, rel=0.1)


def test_command(tmp_path, capsys):
    """Rows that are there are not made again; the table is of them."""
    command = ["--out", str(tmp_path), "--smoke", "--trainer", "sit", "--least", "1"]
    assert trainers.main(command) == 0
    rows = read(tmp_path / "trainers.jsonl")
    assert [row.get("provider") for row in rows] == [None, "plain", "original", "with", "loss"]
    assert trainers.table(rows) in capsys.readouterr().out
    assert trainers.main(command) == 0
    again = read(tmp_path / "trainers.jsonl")
    assert [row for row in again if "provider" in row] == rows[1:]


def test_the_table_of_the_page_is_the_measured_one():
    rows = read(ROOT / "bench/results/zen3_avx2_2_cores/trainers.jsonl")
    page = (ROOT / "docs/accelerate.md").read_text()
    assert f"<!-- trainers -->\n{trainers.table(rows)}<!-- end -->" in page


def test_network_of_a_clone(tmp_path):
    with pytest.raises(InputError, match=r"no .*/meanflow/models/unet\.py"):
        TRAINERS["unet"].original_network(tmp_path)
    with pytest.raises(InputError, match="Leave it out"):
        TRAINERS["meanaudio"].original_network(tmp_path)
    (tmp_path / "sit.py").write_text(
        "import torch\n"
        "def SiT_B_4(**options):\n"
        "    net = torch.nn.Linear(2, 2)\n"
        "    torch.nn.init.zeros_(net.bias)\n"
        "    return net\n"
    )
    assert all(weight.all() for weight in TRAINERS["sit"].original_network(tmp_path).parameters())
