from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfmjt.errors import InputError
from mfmjt.features.format import Part
from mfmjt.features.store import FeatureStore
from mfmjt.model import MFMJT
from mfmjt.train import parallel
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks.step import draw
from mfmjt.train.trainer import CHECKPOINTS
from tests.train.conftest import TINY
from tests.train.ranks import ROOT
from tests.train.states import curve, load_state, newest, records

CLOSE = 64 * torch.finfo(torch.float32).eps  # relative; sums in another order


@pytest.fixture(scope="module")
def start_from(tmp_path_factory) -> Path:
    """A network none of whose gradients is zero, as most of a fresh one's are."""
    torch.manual_seed(3)
    net = MFMJT.from_config("nano", **TINY)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("net") / "start.safetensors"
    net.save(path)
    return path


@pytest.fixture
def run_of(recipe, start_from, tmp_path):
    """run_of(name, **changes) is the recipe of a run in a folder of its own."""

    def make(name: str, **changes):
        common = {
            "batch": 8,
            "drop_video": 0.5,
            "full_every": 0,
            "steps": 1,
            "schedule": "constant",
            "warmup": 1,
            "clip": 0.5,
            "checkpoint_every": 1000,
            "init_from": str(start_from),
        }
        return recipe(out=str(tmp_path / name), **(common | changes))

    return make


def same_tensors(ours: str, theirs: str) -> bool:
    a, b = load_state(ours)[0], load_state(theirs)[0]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_gradients(ranks, truth_config, others) -> None:
    """The first moment of a first step is the clipped gradient, times one less its decay."""
    ranks.train(1, truth_config)
    truth, _ = load_state(truth_config.out)
    logged = records(truth_config.out, "train")[0]
    assert logged["grad_norm"] > truth_config.clip
    gradients = [key for key in truth if key.startswith("exp_avg.")]
    assert len(gradients) > 50
    assert all(truth[key].any() for key in gradients)
    for name, (world, changes) in others.items():
        config = replace(truth_config, out=f"{truth_config.out}-{name}", **changes)
        ranks.train(world, config)
        found, state = load_state(config.out)
        assert state["processes"] == world
        assert found.keys() == truth.keys()
        whole = [torch.cat([t[key].flatten() for key in gradients]) for t in (found, truth)]
        worst, of = max((relative(found[key], truth[key]), key) for key in gradients)
        figures = f"{name}, ratio {config.ratio}: {relative(*whole):.2g}, {worst:.2g} of {of}\n"
        sys.stdout.write(figures)
        assert relative(*whole) <= CLOSE, name
        assert worst <= CLOSE, (name, of)
        figures = records(config.out, "train")[0]
        for key in ("loss", "flow", "interval", "grad_norm"):
            assert (key in figures) == (key in logged)
            if key in logged:
                assert figures[key] == pytest.approx(logged[key], rel=CLOSE), (name, key)


def test_gradients_do_not_depend_on_who_computes_them(ranks, run_of):
    others = {
        "ddp": (2, {"parallel": "ddp"}),
        "fsdp": (2, {"parallel": "fsdp", "checkpointing": True}),
        "uneven": (3, {"accumulate": 2}),  # 6 parts of 8 rows, of which 2 have r < t
    }
    check_gradients(ranks, run_of("alone", ratio=0.25), others)


def test_gradients_agree_where_every_row_has_a_tangent(ranks, run_of):
    others = {"ddp": (2, {"parallel": "ddp"}), "fsdp": (2, {"parallel": "fsdp"})}
    check_gradients(ranks, run_of("alone", ratio=1.0), others)


def first_moments(config) -> torch.Tensor:
    tensors, _ = load_state(config.out)
    return torch.cat([tensors[k].flatten() for k in sorted(tensors) if k.startswith("exp_avg.")])


def test_sharded_bfloat16_errs_no_more_than_one_process_does(ranks, run_of):
    """Blocks whose weights travel in bfloat16, against float32, beside autocast in one process."""
    common = {"ratio": 0.25, "clip": 0.0}
    exact = run_of("exact", **common)
    alone = run_of("alone", dtype="bfloat16", **common)
    sharded = run_of("sharded", dtype="bfloat16", parallel="fsdp", **common)
    for world, config in ((1, exact), (1, alone), (2, sharded)):
        ranks.train(world, config)
    truth = first_moments(exact)
    ours, theirs = (relative(first_moments(config), truth) for config in (sharded, alone))
    sys.stdout.write(f"bfloat16: sharded {ours:.2g}, alone {theirs:.2g}\n")
    assert 0 < ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps
    for figures in (records(config.out, "train")[0] for config in (alone, sharded)):
        assert figures["loss"] == pytest.approx(
            records(exact.out, "train")[0]["loss"], rel=8 * torch.finfo(torch.bfloat16).eps
        )


@pytest.mark.slow
def test_gradients_agree_however_it_is_shared(ranks, run_of):
    others = {
        "passes": (1, {"accumulate": 3}),
        "recomputed": (1, {"checkpointing": True}),
        "ddp passes": (2, {"parallel": "ddp", "accumulate": 2, "checkpointing": True}),
        "fsdp passes": (2, {"parallel": "fsdp", "accumulate": 2}),
        "fsdp of four": (4, {"parallel": "fsdp"}),
    }
    for ratio in (0.0, 0.5):
        check_gradients(ranks, run_of(f"alone-{ratio}", ratio=ratio, full_batch=8), others)


def test_a_batch_does_not_depend_on_how_it_is_shared(recipe, store):
    config, features_of = recipe(), FeatureStore(store)
    batch = draw(config, features_of, 11, 20, 4, torch.Generator().manual_seed(1))
    assert (batch.r < batch.t).tolist() == [True] * 4 + [False] * 7
    for world, parts in ((1, 1), (2, 1), (3, 2)):
        rows = []
        for rank in range(world):
            processes = Processes()
            processes.rank, processes.world = rank, world
            for part in range(parts):
                index = processes.rows(part, parts)
                mine = batch.rows(index)
                rows += range(11)[index]
                # Tangents are dealt out evenly, and come first everywhere.
                count = int((mine.r < mine.t).sum())
                assert count in (4 // (world * parts), -(-4 // (world * parts)))
                assert (mine.r < mine.t)[:count].all()
                assert torch.equal(mine.noise, batch.noise[index])
        assert sorted(rows) == list(range(11))


def test_any_number_of_processes_goes_on(ranks, run_of):
    """2 that shard, then 1, then 3: the run that one process makes, but for rounding."""
    whole = run_of("whole", steps=3, batch=9, ratio=0.5, lr=1e-4)
    part = replace(whole, out=f"{whole.out}-part")
    ranks.train(1, whole)
    ranks.train(2, replace(part, steps=1, parallel="fsdp"))
    ranks.train(1, replace(part, steps=2))
    ranks.train(3, replace(part, steps=3, parallel="ddp"))
    found, expected = curve(part.out), curve(whole.out)
    assert [step for step, *_ in found] == [1, 2, 3]
    for (_, *ours), (_, *theirs) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=4 * CLOSE)
    # What is trained by turns of FSDP and DDP is exported as by one.
    nets = [load_file(Path(c.out) / "network.safetensors") for c in (part, whole)]
    assert nets[0].keys() == nets[1].keys()
    assert all(nets[0][k].shape == nets[1][k].shape for k in nets[0])


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_state_before(ranks, run_of, parallel):
    """One process of two cannot write; both stop, and later both go on, bit for bit."""
    changes = {"steps": 4, "checkpoint_every": 2, "parallel": parallel, "ratio": 0.5}
    whole, part = run_of("whole", **changes), run_of("part", **changes)
    ranks.train(2, whole)
    ranks.train(2, replace(part, steps=2))
    before = newest(part.out)
    ended = ranks.run(2, part, limit=10_000)
    assert ended.statuses == [1, 1]
    assert len(ended.messages) == 2
    for message in ended.messages:
        assert "File too large" in message
        assert "make room" in message
    assert newest(part.out) == before
    names = {path.name for path in (Path(part.out) / CHECKPOINTS).iterdir()}
    assert names == {"latest", before.name}
    ranks.train(2, part)
    assert same_tensors(part.out, whole.out)
    assert curve(part.out) == curve(whole.out)


def test_a_signal_to_one_stops_all(ranks, run_of):
    config = run_of("out", steps=100_000, batch=2)
    children = ranks.start(2, config)
    log = Path(config.out) / "log.jsonl"
    while not log.exists() or '"kind": "train"' not in log.read_text():
        time.sleep(0.02)
    os.kill(children[1], signal.SIGTERM)
    assert ranks.end().statuses == [0, 0]
    step = load_state(config.out)[1]["step"]
    assert 1 <= step < config.steps
    assert [s for s, *_ in curve(config.out)] == list(range(1, step + 1))


@pytest.fixture
def spoiled(store, tmp_path) -> Path:
    """The store with a clip whose latents are not finite."""
    folder = tmp_path / "spoiled"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        for path in (store / split).iterdir():
            (folder / split / path.name).write_bytes(path.read_bytes())
    shard = folder / "train" / "000000.safetensors"
    tensors = load_file(shard)
    tensors["mean"][0] = torch.nan
    save_file(tensors, shard, metadata=Part(store / "train" / shard.name).metadata)
    return folder


def test_all_skip_what_is_not_finite_for_one(ranks, run_of, spoiled):
    config = run_of("alone", store=str(spoiled), steps=8, batch=2, ratio=0.5, clip=0.0)
    shared = replace(config, out=f"{config.out}-ddp", parallel="ddp")
    ranks.train(1, config)
    ranks.train(2, shared)
    skipped = [[r["skipped"] for r in records(c.out, "train")] for c in (config, shared)]
    assert skipped[0] == skipped[1]
    assert 0 < skipped[0][-1] < 8
    tensors, state = load_state(shared.out)
    assert (state["skipped"], state["updates"]) == (skipped[0][-1], 8 - skipped[0][-1])
    assert all(torch.isfinite(t).all() for t in tensors.values())


@pytest.mark.parametrize("preview", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sharded_validation_and_preview(ranks, run_of, preview):
    """Averages in place of shards, and back: as with one process."""
    changes = {"steps": 2, "validate_every": 1, "preview_every": preview, "preview_clips": 1}
    config = run_of("alone", **changes, ema=(0.5, 0.9))
    sharded = replace(config, out=f"{config.out}-fsdp", parallel="fsdp")
    ranks.train(1, config)
    ranks.train(2, sharded)
    lines = [(Path(c.out) / "log.jsonl").read_text().splitlines() for c in (config, sharded)]
    for alone, shared in zip(*(map(json.loads, one) for one in lines), strict=True):
        assert alone.get("kind") == shared.get("kind")
        for key in ("loss", "flow", "mean_r0_t1", "mean_error"):
            if key in alone:
                assert shared[key] == pytest.approx(alone[key], rel=4 * CLOSE)
    made = [{p.name for p in (Path(c.out) / "previews").glob("*")} for c in (config, sharded)]
    assert made[0] == made[1]
    assert bool(made[0]) == bool(preview)


@pytest.mark.parametrize(
    ("world", "changes", "words"),
    [
        (2, {"parallel": "none"}, "parallel=auto"),
        (2, {"batch": 3, "accumulate": 2}, "at least 4"),
        (2, {"parallel": "fsdp", "batch": 8, "ratio": 0.125}, "parallel=ddp"),
        (1, {"parallel": "ddp"}, "torchrun"),
    ],
)
def test_what_cannot_be_shared_says_what_to_do(ranks, run_of, world, changes, words):
    ended = ranks.run(world, run_of("out", **changes))
    assert ended.statuses == [2] * world
    assert len(ended.messages) == world
    assert all(words in message for message in ended.messages)


def test_one_gpu_is_not_for_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device=cuda"):
        Processes("cuda:0")


# With torchrun itself


def torchrun(config, tmp_path: Path, *options: str) -> subprocess.Popen[bytes]:
    settings = tmp_path / "recipe.json"
    settings.write_text(json.dumps({"network": asdict(config)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *options, "-m", "mfmjt.train", "network", str(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment)


def workers(config) -> list[int]:
    """Processes that train in the folder of `config`."""
    recipe = str(Path(config.out).parent / "recipe.json").encode()
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if recipe in words and b"torch.distributed.run" not in words:
                found.append(int(path.name))
    return sorted(found)


@pytest.mark.slow
def test_killed_again_and_again(ranks, run_of):
    """At any moment, while states are being written all the time."""
    changes = {"steps": 24, "checkpoint_every": 1, "batch": 2, "ratio": 0.5}
    whole, part = run_of("whole", **changes), run_of("part", **changes)
    ranks.train(2, whole)
    pointer, kills = Path(part.out) / CHECKPOINTS / "latest", 0
    while True:
        before = pointer.read_text() if pointer.exists() else ""
        children = ranks.start(2, part)
        while (pointer.read_text() if pointer.exists() else "") == before and alive(children):
            time.sleep(0.01)
        time.sleep(random.random() / 5)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        ended = ranks.end()
        if set(ended.statuses) == {0}:
            break
        assert set(ended.statuses) <= {0, -signal.SIGKILL}, ended.messages
        kills += 1
    assert kills > 0
    assert same_tensors(part.out, whole.out)
    assert curve(part.out) == curve(whole.out)


def alive(children: list[int]) -> bool:
    return all(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_torchrun_goes_on_when_a_process_is_killed(ranks, run_of, tmp_path):
    changes = {"steps": 40, "checkpoint_every": 2, "parallel": "ddp", "ratio": 0.5}
    whole, config = run_of("whole", **changes), run_of("out", **changes)
    ranks.train(2, whole)
    process = torchrun(config, tmp_path, "--max-restarts", "1")
    pointer = Path(config.out) / CHECKPOINTS / "latest"
    while not pointer.exists() and process.poll() is None:
        time.sleep(0.005)
    victims = workers(config)
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert b"Going on from step" in errors
    assert same_tensors(config.out, whole.out)
    assert curve(config.out) == curve(whole.out)


@pytest.mark.slow
def test_torchrun_ends_well_after_sigterm(run_of, tmp_path):
    """As a batch system sends it: to every process of the job."""
    config = run_of("out", steps=100_000, batch=2)
    process = torchrun(config, tmp_path)
    log = Path(config.out) / "log.jsonl"
    while not log.exists() or '"kind": "train"' not in log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    for worker in workers(config):
        os.kill(worker, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    step = load_state(config.out)[1]["step"]
    assert [s for s, *_ in curve(config.out)] == list(range(1, step + 1))


def test_fsdp_says_which_torch_it_needs(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    with pytest.raises(InputError, match=r"torch 2\.13"):
        parallel.shard(torch.nn.Linear(1, 1), Processes(), bf16=False)
