"""DeepSpeed checkpoints: an interrupted run is the uninterrupted one, on any number of ranks; and nothing is lost when
a file is damaged or does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_faults import (
    DAMAGES,
    MISFITS,
    TAG,
    Refusal,
    damaged,
    failing,
    load_first,
    misfits,
    settings_changed,
    small_group,
    weights_alone,
    within_accumulation,
    without_record,
)
from checkpoint_jobs import (
    BF16,
    LAST,
    OTHER_STAGE,
    RESHARDED,
    RESUMED,
    SAME_STAGE,
    SAVED,
    SOURCES,
    Trained,
    conversions,
    differences,
    elsewhere,
    explicit,
    in_turn,
    interrupted,
    pretrained,
    resumed,
    straight,
)
from reference import check_parity, reference
from spawn import run_ranks
from torch import Tensor
from torch_jobs import once
from zero_jobs import Job

ALL_SOURCES = {
    **SOURCES,
    "0": Job(RESHARDED, 0),
    "0-bf16": Job(RESHARDED, 0, {}, BF16),
    "3-whole": Job(RESHARDED, 3),
}
JOBS = {**{str(job): job for job in RESUMED}, **ALL_SOURCES}
#: On another number of ranks. Stage 0 needs no conversion.
PAIRS = [*SAME_STAGE, *OTHER_STAGE, ("0", "0"), ("0-bf16", "0-bf16")]
#: On as many ranks: another stage, or other sub-groups.
ON_TWO_RANKS = [("2", "3"), ("3", "1"), ("1-bf16", "2-bf16"), ("3", "3-whole"), ("2", "1")]

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def first(extensions: object, folder: Path) -> Results:
    """Two ranks train, save, and go on."""
    return run_ranks(in_turn, 2, [(name, interrupted, (job, folder / name)) for name, job in JOBS.items()])


@pytest.fixture(scope="module")
def second(first: Results, folder: Path) -> Results:
    """Two fresh ranks: what was interrupted, resumed; and everything that can be wrong with a checkpoint."""
    good = {name: folder / name for name in ALL_SOURCES}
    scratch = folder / "scratch"
    scratch.mkdir()
    probes: list[Any] = [(f"straight {job}", straight, (job,)) for job in RESUMED]
    probes += [(f"resumed {job}", resumed, (job, folder / str(job))) for job in RESUMED]
    probes += [(f"{a} to {b}", elsewhere, (ALL_SOURCES[b], good[a])) for a, b in ON_TWO_RANKS]
    probes += [
        ("damaged", damaged, (scratch, good)),
        ("failing", failing, (scratch, good)),
        ("settings", settings_changed, (good["2"],)),
        ("misfits", misfits, (good, scratch / "two tags")),
        ("weights", weights_alone, (good,)),
        ("without record", without_record, (scratch / "without record",)),
        ("within", within_accumulation, (scratch / "within", good["2"])),
        ("load first", load_first, (ALL_SOURCES, good)),
        ("small group", small_group, (scratch / "small group",)),
    ]
    return run_ranks(in_turn, 2, probes)


@pytest.fixture(scope="module")
def others(first: Results, folder: Path) -> Callable[[int], Results]:
    """One or three fresh ranks; remembered."""

    @once
    def on(world: int) -> Results:
        probes: list[Any] = [(f"{a} to {b}", elsewhere, (ALL_SOURCES[b], folder / a)) for a, b in PAIRS]
        if world == 1:
            alone = (conversions, explicit, pretrained)
            probes += [(probe.__name__, probe, (folder / probe.__name__,)) for probe in alone]
        return run_ranks(in_turn, world, probes)

    return on


def of(results: Results, name: str) -> list[Any]:
    """Each rank's result of a probe; fails where one raised, or an earlier probe did."""
    found = [result.get(name) for result in results]
    if None in found or any(isinstance(x, str) and x.startswith("rank ") for x in found):
        errors = [x for result in results for x in result.values() if isinstance(x, str) and x.startswith("rank ")]
        raise AssertionError(f"{name}:\n" + "\n".join(errors))
    return found


# --- the same ranks ---


@pytest.mark.parametrize("job", RESUMED, ids=str)
def test_resumed_is_uninterrupted(job: Job, first: Results, second: Results) -> None:
    """Weights, thresholds, moments, step counts, learning rates and random numbers, bit for bit, on every rank; the
    save itself disturbs nothing."""
    runs = of(first, str(job)), of(second, f"straight {job}"), of(second, f"resumed {job}")
    for saved, uninterrupted, (loaded, end) in zip(*runs, strict=True):
        assert differences(saved["saved"], loaded) == [], "right after the load"
        assert differences(saved["saved"], saved["back"][0]) == [], "in the engine that had trained on"
        for run in (saved["on"], end, saved["back"][1]):
            assert run.reports == uninterrupted.reports
            assert differences(run.state, uninterrupted.state) == []
            assert torch.equal(run.stream, uninterrupted.stream)
        assert [report.step for report in end.reports] == list(range(SAVED + 1, LAST + 1))
        masked = [report.tau_first is not None or report.tau_second is not None for report in end.reports]
        assert masked == [t > job.case.mask_warmup_steps for t in range(SAVED + 1, LAST + 1)]


def test_what_changes_is_under_way(first: Results) -> None:
    """The jobs above have a learning rate that changes, groups that differ, and a loss scale that grows."""
    for job in RESUMED:
        state = of(first, str(job))[0]["saved"]
        if job.name == "fp16":
            assert state["loss scale"]["cur_scale"] < of(first, str(job))[0]["on"].state["loss scale"]["cur_scale"]
        if job.name == "scheduler":
            assert state["group0/lr"] != of(first, str(job))[0]["on"].state["group0/lr"]
        if job.case.two_groups:
            assert state["group0/betas"] != state["group1/betas"]


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_zero_to_fp32(job: Job, first: Results) -> None:
    """DeepSpeed's extraction gives what gather_parameters() gives. It cannot read BF16_Optimizer's files, and at
    stage 1 leaves frozen parameters out."""
    result = of(first, next(name for name, other in JOBS.items() if other is job))[0]
    whole = result["zero_to_fp32"]
    if job.stage == 0:
        assert whole == {}
    elif job.stage == 1 and job.config.get("bf16"):
        assert "is not a zero checkpoint" in whole
    else:
        saved = {key[:-5]: value for key, value in result["saved"].items() if key.endswith("/fp32")}
        absent = {"embeddings.weight"} if job.stage == 1 and job.case.frozen else set()
        assert set(whole) - {"seen"} == set(saved) - absent
        assert all(torch.equal(value, saved[key]) for key, value in whole.items() if key != "seen")


def test_save_pretrained(others: Any) -> None:
    """What zero_to_fp32 extracts at stage 3 becomes a Hugging Face folder with the parameters that training held."""
    (found,) = of(others(1), "pretrained")
    assert found["names"] and found["same"] and all(found["same"])


# --- other ranks, other stages ---


def check_elsewhere(results: list[Any], source: dict[str, Any], job: Job) -> None:
    """The state is the saved one to the bit; the run goes on as it would have."""
    for loaded, end, messages in results:
        assert differences(source["saved"], loaded) == []
        assert end.reports == results[0][1].reports, "thresholds are the same bits on every rank"
        assert messages == []
    end: Trained = results[0][1]
    names = [key[:-5] for key in end.state if key.endswith("/fp32")]
    if not job.config:
        twin = reference(job.case)
        check_parity({name: end.state[f"{name}/fp32"] for name in twin.parameters}, twin)
        for report, want in zip(end.reports, twin.steps[SAVED:], strict=True):
            assert report.tau_first == pytest.approx(want.tau["first"], rel=1e-3)
            assert report.tau_second == pytest.approx(want.tau["second"], rel=1e-3)
        assert torch.equal(end.stream, twin.stream)
    got, on = (
        torch.cat([state[f"{name}/fp32"].flatten() for name in names]) for state in (end.state, source["on"].state)
    )
    assert ((got - on).norm() / on.norm()).item() < (0.02 if job.config else 1e-5)
    assert {k: v for k, v in end.state.items() if not isinstance(v, Tensor)} == {
        k: v for k, v in source["on"].state.items() if not isinstance(v, Tensor)
    }


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-at-{pair[1]}")
@pytest.mark.parametrize("world", [1, 3])
def test_other_ranks(world: int, pair: tuple[str, str], first: Results, others: Any) -> None:
    """Saved on two ranks, resumed on one and on three, at the same stage and at another; parameters that do not train,
    buffers and each group's settings come along."""
    a, b = pair
    check_elsewhere(of(others(world), f"{a} to {b}"), of(first, a)[0], ALL_SOURCES[b])


@pytest.mark.parametrize("pair", ON_TWO_RANKS, ids=lambda pair: f"{pair[0]}-at-{pair[1]}")
def test_other_stage(pair: tuple[str, str], first: Results, second: Results) -> None:
    """The same number of ranks, another stage or another division into sub-groups."""
    a, b = pair
    check_elsewhere(of(second, f"{a} to {b}"), of(first, a)[0], ALL_SOURCES[b])


def test_conversion_is_made_once(others: Any) -> None:
    """It is used again, made anew when its source was saved anew, and leaves no scratch files."""
    (found,) = of(others(1), "conversions")
    assert found["first"] == found["again"] == found["after another save"] == []
    assert found["same folder"]
    assert not [name for name in found["there"] if name.startswith(".")]
    assert {TAG, f"{TAG}_universal", "latest"} <= set(found["there"])


def test_load_universal(others: Any) -> None:
    """checkpoint.load_universal: true takes what DeepSpeed's command made, or converts; stage 0 needs neither."""
    (found,) = of(others(1), "explicit")
    assert found.pop("0") == (TAG, [])
    assert len(found) == 8
    for how, (folder, different) in found.items():
        assert folder == ("by-command" if "by command" in how else f"{TAG}_universal"), how
        assert different == [], how


# --- damage ---


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged(what: str, second: Results) -> None:
    """Every rank says which file, soon, and nothing has changed."""
    for result in of(second, "damaged"):
        refusal: Refusal = result[what]
        assert refusal.error.startswith("RefusedConfiguration: ")
        assert refusal.file in refusal.error
        assert refusal.changed == []
        assert refusal.seconds < 20


def test_engine_loads_after_refusals(first: Results, second: Results) -> None:
    """The engines that refused all of these then load a good one."""
    for result in of(second, "damaged"):
        for stage in ("2", "3"):
            assert differences(of(first, stage)[0]["saved"], result[f"good {stage}"]) == []


def test_faults_on_one_rank(first: Results, second: Results) -> None:
    """What fails on one rank fails on all: a conversion, with nothing changed and nothing left; a read in the middle of
    the load, when the engine must be built anew. Ranks wait for a conversion longer than a collective would."""
    for rank, result in enumerate(of(second, "failing")):
        refusal: Refusal = result["conversion"]
        assert re.search(r"RuntimeError: rank 0: .*could not be converted.*No space left on device", refusal.error), (
            rank
        )
        assert refusal.changed == [] and result["left"] == []
        assert re.search(r"RefusedConfiguration: checkpoint.use_node_local_storage", result["node local"].error), rank
        assert differences(of(first, "3")[0]["saved"], result["slow"]) == []
        assert re.search(r"RuntimeError: rank 1: OSError.*build the engine anew", result["load"]), rank


# --- what does not fit ---


def test_changed_settings_are_named(first: Results, second: Results) -> None:
    """Old and new value of each, once; and the checkpoint is loaded, with its learning rate and not the new one."""
    saved = of(first, "2")[0]["saved"]
    zero, one = of(second, "settings")
    for _, state in (*zero.values(), *one.values()):
        assert differences(saved, state) == []
    assert all(messages == [] for messages, _ in one.values()), "rank 0 alone speaks"
    said = {name: " | ".join(messages) for name, (messages, _) in zero.items()}
    assert said["same"] == ""
    for change in (
        "with granularity='element'; from here on granularity='tensor'",
        "with keep_first=0.6; from here on keep_first=0.5",
        "with strategy='ensemble'; from here on strategy='first'",
    ):
        assert change in said["changed"]
    assert len(zero["changed"][0]) == 3
    assert "with include=('layer.*weight',); from here on include=('up.weight',)" in said["include"]
    assert "gradient_clipping=0.7 comes from the checkpoint; the configuration says 0.9" in said["clipping"]


@pytest.mark.parametrize("what", MISFITS)
def test_misfit(what: str, second: Results) -> None:
    """Refused on every rank, by name, with nothing changed."""
    for result in of(second, "misfits"):
        refusal: Refusal = result[what]
        assert refusal.error.startswith("RefusedConfiguration: ")
        assert re.search(MISFITS[what][3], refusal.error), refusal.error
        assert refusal.changed == []


def test_small_group(second: Results) -> None:
    """DeepSpeed's loader fails on a rank that holds nothing of a parameter group: said beforehand, on every rank."""
    assert all("holds nothing of a small parameter group" in error for error in of(second, "small group"))


def test_weights_alone(first: Results, second: Results) -> None:
    """Weights are the checkpoint's, moments and steps those of a new run."""
    for result in of(second, "weights"):
        for stage, state in result.items():
            different = differences(of(first, stage)[0]["saved"], state)
            assert state["step"] == {0}
            assert not [key for key in different if key.endswith("/fp32")]
            assert not any(value.any() for key, value in state.items() if "/exp_avg" in key)


def test_without_record(second: Results) -> None:
    """A checkpoint of plain AdamW is loaded, moments and step count too, with a warning that names it; one whose states
    are others is refused."""
    for rank, result in enumerate(of(second, "without record")):
        for stage in ("0", "2", "3"):
            messages, moments, numbers = result[stage]
            assert moments and numbers == [2]
            assert [bool(re.search(r"global_step1 has no ROSE record", m)) for m in messages] == [True] * (rank == 0)
        assert re.search(r"optim_states.pt has no \['step'\] among its optimizer states", result["no step"].error)
        assert result["no step"].changed == []


# --- when ---


def test_within_accumulation(second: Results) -> None:
    """Neither saved nor loaded between micro-batches, and the step is none the worse."""
    for result in of(second, "within"):
        assert len(result["errors"]) == 8
        assert all("in the middle of an accumulation" in error for error in result["errors"])
        assert result["at the boundary"] == ""
        assert result["changed"] == [] and not result["there"]


@pytest.mark.parametrize("name", ALL_SOURCES)
def test_load_before_prepare(name: str, first: Results, second: Results) -> None:
    """As transformers.Trainer does it: the same run, and a word that settings were not compared."""
    for rank, (before, result) in enumerate(zip(of(first, name), of(second, "load first"), strict=True)):
        loaded, end, messages = result[name]
        assert differences(before["saved"], loaded) == []
        assert differences(before["on"].state, end.state) == []
        assert end.reports == before["on"].reports
        assert ["were not compared" in message for message in messages] == [True] * (rank == 0)


def test_order_and_odd_calls(first: Results, second: Results) -> None:
    """prepare() twice; a universal checkpoint loaded too early; no checkpoint at all; elastic checkpoints."""
    for result in of(second, "load first"):
        state, messages = result["twice"]
        assert differences(of(first, "2")[0]["saved"], state) == [] and messages == []
        assert re.search(r"RefusedConfiguration.*prepare\(engine\) first", result["universal"])
        assert result["nothing there"] == (None, None)
        assert re.search(r"RefusedConfiguration.*elastic_checkpoint.*set it to false", result["elastic"])
