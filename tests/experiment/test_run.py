from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from mfmjt.errors import InputError, RunError
from mfmjt.experiment.grid import NAMES, Grid, Job, load_experiment
from mfmjt.experiment.page import main, read_rows, write_page
from mfmjt.experiment.run import digest, run
from mfmjt.experiment.work import work
from tests.support.commands import refused
from tests.support.commands import run as command


def test_every_network_has_its_rows(grid: Grid) -> None:
    rows = read_rows(grid.folder / "rows.jsonl")
    assert {(row["arm"], row["seed"]) for row in rows} == {
        (arm, seed) for arm in grid.arms() for seed in range(3)
    }
    for row in rows:
        assert len(row["clips"]["right"]) == 2
        assert row["class_accuracy"] == sum(row["clips"]["right"]) / 2
        matched, reference, estimated = map(sum, zip(*row["clips"]["onsets"], strict=True))
        assert row["onset_f1"] == pytest.approx(2 * matched / (reference + estimated))
    about = json.loads((grid.folder / "experiment.json").read_text())
    assert about["seeds"] == 3
    assert about["digest"] == digest(rows)


def test_seeds_differ_and_a_seed_repeats(grid: Grid, tmp_path: Path) -> None:
    job = Job("10 %", 1)
    other = dataclasses.replace(grid, out=str(tmp_path))
    (other.folder / "parts").mkdir(parents=True)
    shutil.copytree(grid.features().out, other.features().out)
    work(other, job)
    (again,) = json.loads(other.result(job).read_text())["rows"]
    rows = read_rows(grid.folder / "rows.jsonl")
    first, second = ([r for r in rows if (r["arm"], r["seed"]) == ("10 %", s)] for s in (1, 2))
    assert digest([again]) == digest(first) != digest(second)


def test_networks_are_shared_by_experiments(grid: Grid) -> None:
    other = dataclasses.replace(grid, name="steps")
    assert other.file(Job("flow matching", 2)) == grid.file(Job("0 %", 2))
    assert other.file(Job("MeanFlow", 2)) != grid.file(Job("10 %", 2))


def test_the_page_is_made_of_the_files(grid: Grid, tmp_path: Path) -> None:
    page = (grid.folder / "ratio.md").read_text()
    assert page == write_page(grid.folder, grid.folder / "ratio.md").read_text()
    rows = read_rows(grid.folder / "rows.jsonl")
    mean = sum(row["class_accuracy"] for row in rows if row["arm"] == "30 %") / 3
    (row,) = (line for line in page.splitlines() if line.startswith("| 30 % | "))
    assert f"| {mean:.3f} (" in row
    assert (grid.folder / "ratio.svg").stat().st_size > 1000
    shutil.copytree(grid.folder, tmp_path / "ratio")
    damaged = tmp_path / "ratio" / "rows.jsonl"
    damaged.write_text("\n".join(damaged.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(InputError, match="2 seeds: an interval needs at least 3"):
        write_page(tmp_path / "ratio", tmp_path / "page.md")


def test_pages_of_several_results(grid: Grid, tmp_path: Path) -> None:
    shutil.copytree(grid.folder, tmp_path / "results" / "ratio")
    assert main([str(tmp_path / "results"), str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "ratio.md").read_text()
    assert page.replace("../results/ratio/", "") == (grid.folder / "ratio.md").read_text()
    assert (tmp_path / "pages" / "ratio.svg").exists()


def test_what_is_done_is_not_done_again(grid: Grid) -> None:
    jobs = [Job(arm, seed) for seed in range(3) for arm in grid.arms()]
    times = {job: grid.result(job).stat().st_mtime_ns for job in jobs}
    run(grid, 3, 2)
    assert {job: grid.result(job).stat().st_mtime_ns for job in jobs} == times


def test_another_configuration_is_refused(grid: Grid) -> None:
    with pytest.raises(InputError, match="results of another recipe and network and data"):
        run(dataclasses.replace(grid, recipe="pico"), 3, 1)
    path = grid.folder / "experiment.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"version": "', '"version": "0.'))
        with pytest.raises(InputError, match="results of another version"):
            run(grid, 3, 1)
    finally:
        path.write_text(text)


def test_too_few_and_too_many_seeds_are_refused(grid: Grid) -> None:
    for seeds in (2, 11):
        with pytest.raises(InputError, match=f"--seeds {seeds}: an interval needs 3 to 10"):
            run(grid, seeds, 1)


def test_a_failed_process_is_reported(grid: Grid, tmp_path: Path) -> None:
    settings = json.loads(Path(grid.recipe).read_text())
    settings["network"]["init_from"] = "missing.safetensors"
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(settings))
    broken = dataclasses.replace(grid, out=str(tmp_path / "out"), recipe=str(recipe))
    shutil.copytree(grid.features().out, broken.features().out)
    with pytest.raises(RunError, match=r"seed 0, failed: .*missing\.safetensors.*the same command"):
        run(broken, 3, 1)
    assert not list(broken.folder.glob("parts/*.json"))


def test_the_list() -> None:
    listed = command("experiment", "list")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(NAMES)
    refused(command("experiment", "guidanse"), 2, ", ".join(NAMES))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [False, True])
def test_claims_and_needs_are_of_the_arms(name: str, quick: bool, tmp_path: Path) -> None:
    """Every claim picks one cell of the grid, and every recipe is one that can be trained."""
    grid = Grid(name, str(tmp_path), quick=quick)
    arms, experiment = grid.arms(), load_experiment(name)
    cells = [{"arm": arm.name, **arm.at, **way.about} for arm in arms.values() for way in arm.ways]
    for claim in experiment.claims:
        for wanted in (claim.better, claim.worse):
            found = [c for c in cells if all(c.get(k) == v for k, v in wanted.items())]
            assert len(found) == 1, (claim.says, wanted)
    for arm in arms.values():
        assert set(arm.needs) <= set(arms)
        grid.network(Job(arm.name, 0))
