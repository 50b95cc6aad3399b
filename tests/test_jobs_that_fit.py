"""Jobs are cut so that none comes near a server's limits, before and while they run; what cannot work is refused."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from fake_service import Clock, FakeService, Killed, assert_right, unit
from shapes import save_ids, save_shape
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import SPLIT, Ledger, lines
from selfrepair_nn.backends.ndif.limits import Limits, limits_of, told
from selfrepair_nn.backends.ndif.served import limits_there
from selfrepair_nn.backends.ndif.server import Answer
from selfrepair_nn.errors import UsageError
from selfrepair_nn.estimating.cutting import cheapest, jobs_for
from selfrepair_nn.estimating.fitting import Cutting, Jobs, fitted, jobs_of
from selfrepair_nn.estimating.pace import SAFETY, Cost, Pace, Rates, assumed, measured
from selfrepair_nn.estimating.preview import preview_text
from selfrepair_nn.estimating.timetable import hours_of
from selfrepair_nn.estimating.workable import Here, kept_bytes, require_workable
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.models.load import describe
from selfrepair_nn.models.model import AS_SERVED, Model
from selfrepair_nn.options import Options

GIB = 2**30
ROOM = Here(memory=1024 * GIB, disk=10**18)
RECORDS = {"sums": {}, "total": {"split": "total"}, "components": {"components": "all"}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """prepared(shape, **choices): the experiment on a hosted server."""
    folder = tmp_path_factory.mktemp("shapes")
    ids = save_ids(folder / "ids.npy", prompts=24)

    @cache
    def described(shape):
        return Model(describe(save_shape(shape, folder / shape)), None, None, AS_SERVED, "server")

    def made(shape, **choices):
        place = {} if "host" in choices else {"remote": True}
        options = {"prompts": ids, "out": str(folder / "out"), **place, **choices}
        return prepare("heads", Options(model=described(shape), **options))

    return made


@pytest.fixture(scope="module")
def planned(prepared):
    """The same in blocks that fit it."""
    return lambda shape, **choices: fitted(prepared(shape, **choices))


LATE = {"Llama-3.1-8B": "24:", "Llama-3.1-70B": "78:", "Llama-3.1-405B": "125:"}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(("shape", "layers"), LATE.items())
def test_no_job_of_a_plan_comes_near_the_limit(planned, shape, layers, record):
    """Every ablation of every prompt is asked for once, and no job takes more than half of what can be halved."""
    experiment = planned(shape, layers=layers, **RECORDS[record])
    jobs = jobs_of(experiment)
    require_workable(jobs, ROOM)
    asked = Counter()
    for count, units in jobs.blocks:
        for each in units:
            asked["pairs"] += count * len(each.plan["cases"]) * (each.prompts.stop - each.prompts.start)
            cost = jobs.cost(each)
            once = jobs.pace.slow.job + cost.once * jobs.pace.slow.byte
            assert jobs.pace.slow.seconds(cost) <= once + (3600 - once) / SAFETY
    assert asked["pairs"] == len(experiment.graph.ablate) * experiment.prompts.n
    least, most = hours_of(jobs)["hours"]
    assert 0 < least < most


def test_more_of_anything_takes_longer(planned):
    def taken(shape="Llama-3.1-8B", **choices):
        return hours_of(jobs_of(planned(shape, **{"layers": "30:"} | choices)))["hours"]

    plain = taken()
    for more in ({"layers": "28:"}, {"shape": "Llama-3.1-70B"}, {"components": "all"}, {"tensor_parallel": 8}):
        assert all(one < other for one, other in zip(plain, taken(**more), strict=True)), more
    for less in ({"split": "total"}, {"heads": "31.0"}):
        assert all(one > other for one, other in zip(plain, taken(**less), strict=True)), less


def test_what_crosses_is_multiplied_by_the_degree(planned):
    one, eight = (jobs_of(planned("Llama-3.1-8B", layers="30:", batch_size=1, tensor_parallel=n)) for n in (1, 8))
    (first, *_), (other, *_) = one.of(slice(0, 1)), eight.of(slice(0, 1))
    assert len(first.plan["cases"]) == len(other.plan["cases"])
    assert eight.cost(other).crossing == 8 * one.cost(first).crossing
    assert eight.cost(other).flops == one.cost(first).flops


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("said by none", 2), ("nn", 2)])
def test_what_crosses_is_as_wide_as_the_server_computes(planned, dtype, size):
    experiment = planned("Llama-3.1-8B", heads="31.*")
    nobody = SimpleNamespace(hosts=SimpleNamespace(left=[]))
    limits = limits_there(nobody, experiment.options, dtype)
    (_, (job, *_)), *_ = (jobs := jobs_of(experiment)).blocks
    assert jobs_of(experiment, limits).cost(job).crossing == size / 2 * jobs.cost(job).crossing
    assert limits == replace(limits_of(experiment.options), itemsize=size)


def test_what_fits_is_not_cut(planned):
    roomy = planned("Llama-3.1-8B", heads="31.*")
    assert roomy.work.block == roomy.prompts.n
    assert [len(units) for _, units in jobs_of(roomy).blocks] == [1]
    assert planned("Llama-3.1-8B", heads="31.*", job_seconds=90, batch_size=24).work.block == 24


def halved(jobs, unit):
    """The jobs of a unit that is halved until all fit, its prompts first."""
    halves = () if jobs.fits(unit) else unit.halves()
    return [piece for half in halves for piece in halved(jobs, half)] or [unit]


CUT = {
    "8B": ("Llama-3.1-8B", {"heads": "31.*", "job_seconds": 90}),
    "70B": ("Llama-3.1-70B", {"layers": "78:", "tensor_parallel": 4}),
    "70B, total": ("Llama-3.1-70B", {"layers": "70:", "split": "total", "tensor_parallel": 4}),
    "405B": ("Llama-3.1-405B", {"layers": "125:", "tensor_parallel": 8}),
}


@pytest.mark.parametrize("which", CUT)
def test_no_number_of_prompts_in_a_block_takes_less_time(prepared, planned, which):
    """Nor does halving, of as many prompts as a job may be asked for. Every pair is asked for once."""
    shape, choices = CUT[which]
    experiment = planned(shape, **choices)
    jobs = jobs_of(experiment)
    pairs = (n * len(u.plan["cases"]) * (u.prompts.stop - u.prompts.start) for n, us in jobs.blocks for u in us)
    assert sum(pairs) == len(experiment.graph.ablate) * experiment.prompts.n
    taken = hours_of(jobs)["hours"][1]
    others = {}
    most = prepared(shape, **choices).work.block
    for block in [size for size in (1, 2, 3, 6) if size <= most]:
        other = jobs_of(planned(shape, batch_size=block, **choices))
        others[block] = hours_of(other)["hours"][1]
        pieces = halved(other, other._units(slice(0, block))[0])
        assert others[block] <= 24 / block * sum(map(other.seconds, pieces)) / 3600 * (1 + 1e-9)
    assert taken <= min(others.values()) * (1 + 1e-9)
    assert taken < 0.95 * max(others.values())


def test_a_block_is_stored_while_the_server_still_keeps_all_of_it(prepared):
    """What takes longer is no block, however cheap, unless it is one prompt."""
    experiment = prepared("Llama-3.1-8B", heads="31.*", job_seconds=90)

    def best(hours):
        return jobs_of(experiment, Limits(seconds=90, sandboxed=True, kept_hours=hours)).best_block

    def taken(block):
        jobs = jobs_of(experiment.in_units_of(block), Limits(seconds=90, sandboxed=True))
        return sum(map(jobs.seconds, jobs.of(slice(0, block)))) / 3600

    most = best(24)
    assert most > 1
    assert best(1.01 * taken(most)) == most
    assert best(0.99 * taken(most)) < most
    assert best(0) == 1


def test_a_server_that_ends_no_job_gets_whole_blocks(prepared):
    experiment = prepared("Llama-3.1-405B", heads="100.*", job_seconds=10**7, tensor_parallel=8)
    assert fitted(experiment).work.block == experiment.work.block
    assert jobs_of(experiment, Limits(seconds=10**7, sandboxed=True, kept_hours=0)).best_block > 1


class OfParts:
    """Costs of a job: a clean pass for each prompt, and one for each pair of case and prompt."""

    def __init__(self, clean):
        self._clean = clean

    def of(self, each):
        prompts = each.prompts.stop - each.prompts.start
        return Cost(prompts * (self._clean + len(each.plan["cases"])), 0)


def parted(clean, job):
    """Jobs of such costs, a second for each, on a server that gives a job 100 seconds, `job` of them for itself."""
    rates = Rates(job, 1, 0)
    found = Jobs(None, Limits(seconds=100), Pace(rates, rates))
    vars(found)["costs"] = OfParts(clean)
    return found


BY_HAND = {
    "clean passes are dear": (10, 4, [(1, 16)] * 4, 120),
    "jobs are dear": (1, 40, [(4, 6), (4, 6), (4, 4)], 196),
    "in between": (4, 20, [(2, 16)] * 2, 120),
    "a case of all prompts is too much": (20, 4, [(1, 16)] * 4, 160),
}
"""Of 4 prompts and 16 cases: what a clean pass and what a job takes, (prompts, cases) of the jobs, and their seconds.

First: jobs may take 48 s beside their 4. Four prompts have room for 2 cases: 8 jobs of 52 s; two for 14, and 2: 52 and
28 s, twice; one for all 16: 30 s, four times. Second: 30 s beside 40. Four have room for 6; two for 14: 70 and 46 s,
twice; one for all: 57 s, four times. Third: 40 s beside 20. Four have room for 6: 60, 60 and 52 s; two for all: 60 s,
twice; one for all: 40 s, four times. Last: 48 s beside 4. Two have room for 4: 52 s, eight times; one for all.
"""


@pytest.mark.parametrize("which", BY_HAND)
def test_jobs_are_those_found_by_hand(which):
    clean, job, expected, seconds = BY_HAND[which]
    jobs = parted(clean, job)
    whole = unit(0, 4, cases=16)
    found = jobs_for(whole, jobs)
    assert [(each.prompts.stop - each.prompts.start, len(each.plan["cases"])) for each in found] == expected
    assert cheapest(whole, jobs)[0] == sum(map(jobs.seconds, found)) == seconds


def test_jobs_in_this_process_have_no_limit():
    experiment = prepare("heads", Options(model="tiny-neox", tokens=1024))
    assert fitted(experiment) is experiment


# ---------------------------------------------------------------- what cannot work


REFUSED = {
    "components": ("Llama-3.1-405B", {"layers": "100:", "components": "all", "tensor_parallel": 8}, ROOM),
    "time": ("Llama-3.1-70B", {"heads": "0.0", "job_seconds": 13}, ROOM),
    "memory": ("Llama-3.1-70B", {"components": "all", "layers": "40:"}, replace(ROOM, memory=8 * GIB)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_with_a_choice_that_does(planned, what):
    """The choice that is named is taken, by the same planner."""
    shape, choices, here = REFUSED[what]
    with pytest.raises(UsageError, match="this cannot work") as refused:
        require_workable(jobs_of(planned(shape, **choices)), here)
    assert str(refused.value).count("\n") == 0
    named = re.search(r"it does with (.+)$", str(refused.value))[1]
    flags = dict(re.findall(r"--([a-z-]+) (\S+)", named))
    require_workable(jobs_of(planned(shape, **choices | flags)), here)


def test_a_store_that_the_disk_cannot_hold_is_refused(planned):
    """Top tokens alone can be: the rest is blank, and takes nothing."""
    whole = planned("Llama-3.1-8B", layers="24:", split="total")
    few = planned("Llama-3.1-8B", layers="24:", split="total", select="top-share")
    assert kept_bytes(few) < 0.3 * kept_bytes(whole)
    disk = Here(ROOM.memory, round(0.4 * kept_bytes(whole)))
    with pytest.raises(UsageError, match=r"the store takes .* it does with --select top-share$"):
        require_workable(jobs_of(whole), disk)
    require_workable(jobs_of(few), disk)


@pytest.mark.parametrize("limit", representative(["2 s", "1 s", "a second less", "hardly less"], "hardly less"))
def test_what_no_choice_mends_is_said(planned, limit):
    """In digits that tell what there is from what it takes."""
    tried = jobs_of(planned("Llama-3.1-405B", heads="125.0", job_seconds=2, tensor_parallel=8))
    least = tried.pace.seconds(tried.cost(tried.smallest))[0]
    less = "after {}; nor does it with less: choose a smaller model, or a server that gives a job longer"
    seconds, said = {
        "2 s": (2, less.format("2 seconds")),
        "1 s": (1, less.format("1 second")),
        "a second less": (least - 1, r"\.\d+ min"),
        "hardly less": (least - 1e-7, "hardly"),
    }[limit]
    with pytest.raises(UsageError, match=said):
        require_workable(replace(tried, limits=replace(tried.limits, seconds=seconds)), ROOM)


@pytest.mark.thorough
def test_what_no_choice_mends_is_said_with_where_there_is_more_of_it(planned):
    lacking = {replace(ROOM, memory=1): "where more memory is free", replace(ROOM, disk=2**20): "another --out"}
    for few, said in lacking.items():
        with pytest.raises(UsageError, match=rf"nor does it with less: choose a smaller model, or .*{said}") as refused:
            require_workable(jobs_of(planned("Llama-3.1-405B", layers="0:")), few)
        assert "0.0 GiB" not in str(refused.value)


def test_words_are_not_asked_of_a_run_that_tells_no_part_apart():
    with pytest.raises(UsageError, match="leave words 5 out"):
        Options(split="total", words=5)


def test_where_jobs_may_run_beside_the_weights_nothing_is_refused_for_what_crosses(planned):
    """A server of one's own may have no sandbox: only what fails without one is refused before it was asked."""
    shape, choices, here = REFUSED["components"]
    require_workable(jobs_of(planned(shape, **choices, host="http://127.0.0.1:1")), here)


def test_a_plan_is_printed_with_limits_and_a_range(tmp_path):
    model, ids = save_shape("Llama-3.1-8B", tmp_path / "m"), save_ids(tmp_path / "ids.npy", prompts=4)
    found = sr.preview(model=model, prompts=ids, remote=True, layers="30:", tensor_parallel=2)
    text = preview_text(found)
    assert found["job_seconds"][1] < found["job_limit"] == 3600
    assert found["hours"][0] < found["hours"][1]
    assert "too little where the server is slow" not in text
    assert "too little where the server is slow" in preview_text(found | {"job_seconds": (9.0, 4000.0)})
    for said in ("of 60 minutes that the ", "assumed 50 to 300 TFLOP/s", "(2 processes together)", "24 hours"):
        assert said in text
    assert not [*tmp_path.glob("**/*.safetensors")]


# ---------------------------------------------------------------- what a server says, and what is seen of it


TP = {"actor_class": "ndif.services.ray.tp.model.SandboxedTPModelActor", "gpus": 8}
PLAIN = {"actor_class": "ndif.services.ray.deployments.modeling.base.ModelActor", "gpus": 2}


@pytest.mark.parametrize(
    ("replicas", "chosen", "expected"),
    [
        ([], {}, {}),
        ([TP], {}, {"degree": 8}),
        ([TP], {"tensor_parallel": 2}, {"degree": 2}),
        ([PLAIN], {}, {"sandboxed": False}),
        ([PLAIN, TP | {"execution_timeout_seconds": 600}], {}, {"degree": 8, "seconds": 600.0}),
        ([TP | {"execution_timeout_seconds": 600}], {"job_seconds": 60}, {"degree": 8, "seconds": 60}),
        ([{"execution_timeout_seconds": None, "gpus": None}], {}, {}),
        ([{"execution_timeout_seconds": "soon", "actor_class": None}], {}, {}),
    ],
)
def test_limits_are_those_that_the_server_tells(replicas, chosen, expected):
    options = Options(host="http://127.0.0.1:1", tokens=8, **chosen)
    assert told(limits_of(options), options, replicas) == Limits(**expected)


def test_two_jobs_tell_what_every_job_takes_and_what_its_work_does():
    true, few, many = Rates(2.0, 1e-13, 2e-8), Cost(1e13, 1e9), Cost(9e13, 9e9)
    found = measured(assumed(Limits()), [(c, true.seconds(c)) for c in (few, few, many, many)])
    for cost in (few, many, Cost(9e15, 9e11)):
        least, most = found.seconds(cost)
        assert least < true.seconds(cost) < most < 3 * least


def test_a_pace_is_learned_from_jobs_whose_work_shows():
    pace = assumed(Limits(sandboxed=True))
    assert pace.learned(Cost(1e9, 1e3), 4.0) is pace
    large = Cost(1e15, 1e10)
    quick = pace.learned(large, pace.slow.seconds(large) / 4)
    assert quick.slow.work(large) == pytest.approx(pace.slow.seconds(large) / 4)
    assert quick.learned(large, 1.0).slow == quick.slow
    assert quick.learned(large, 5000.0).slow.work(large) == pytest.approx(5000.0)


class OfPairs:
    """Costs that are as many operations as a unit has case x prompt pairs."""

    def of(self, each):
        return Cost(len(each.plan["cases"]) * (each.prompts.stop - each.prompts.start), 0)


class Pairs(Jobs):
    costs = OfPairs()


def cutter(said, seconds):
    """What is expected of a server that gives a job 100 seconds: so many for a pair."""
    rate = Rates(0.5, seconds, 0)
    return Cutting(Pairs(None, Limits(seconds=100), Pace(rate, rate)), said.append)


class Timed(FakeService):
    """A server that takes ten seconds for a pair, says so, and ends what takes longer than a hundred."""

    def ask(self, job):
        answer = super().ask(job)
        if answer is None or answer.status != "COMPLETED":
            return answer
        _, prompts, cases = self.jobs[job].unit
        seconds = 10.0 * len(prompts) * len(cases)
        if seconds > 100:
            return Answer("ERROR", "Your job exceeded the execution timeout of 100.0s.", None)
        return replace(answer, seconds=seconds)


def flown(path, service, cut, units):
    clock = service.clock
    flight = JobsInFlight(service, Ledger(path, "run", clock), 1, 1800, clock=clock, sleep=clock.sleep)
    flight.cutter = cut
    return list(flight(units))


WORK = [unit(0, 4, cases=4), unit(4, 8, cases=4)]


def test_jobs_are_cut_before_they_are_sent(tmp_path):
    """What is expected is right: no job fails, and none takes more than half of the limit."""
    service, said = Timed(Clock()), []
    found = flown(tmp_path / "j.jsonl", service, cutter(said, 10.0), WORK)
    for each, result in found:
        assert_right(each, result)
    assert max(len(prompts) * len(cases) for _, prompts, cases in service.sent) == 4
    assert len(service.sent) == 8
    assert not [each for each in lines(tmp_path / "j.jsonl") if each["event"] == "failed"]
    assert said == ["jobs are cut so that none comes near the 100 seconds that the server gives each"]


def test_what_jobs_take_decides_how_the_next_are_cut(tmp_path):
    """Ten times too much was expected: only what was sent at first is that small."""
    service = Timed(Clock())
    for each, result in flown(tmp_path / "j.jsonl", service, cutter([], 40.0), WORK):
        assert_right(each, result)
    sizes = [len(prompts) * len(cases) for _, prompts, cases in service.sent]
    assert sizes[0] == 1
    assert max(sizes) == 4


def test_without_what_is_expected_jobs_are_cut_by_failing(tmp_path):
    """The same server without a cutter: the limit is found out, at the price of failed jobs."""
    service = Timed(Clock())
    for each, result in flown(tmp_path / "j.jsonl", service, None, WORK):
        assert_right(each, result)
    assert [each for each in lines(tmp_path / "j.jsonl") if each["event"] == "failed"]


@pytest.mark.parametrize("kill_at", range(2, 22, 4))
def test_a_killed_run_goes_on_with_the_parts_that_it_was_cut_into(tmp_path, kill_at):
    service = Timed(Clock(), kill_at=kill_at)
    with pytest.raises(Killed):
        flown(tmp_path / "j.jsonl", service, cutter([], 10.0), WORK)
    for each, result in flown(tmp_path / "j.jsonl", service, cutter([], 1.0), WORK):
        assert_right(each, result)
    asked = Counter((p, c) for _, prompts, cases in service.sent for p in prompts for c in cases)
    assert set(asked.values()) == {1}
    assert len(asked) == 32


def sizes(service):
    return [(len(prompts), len(cases)) for _, prompts, cases in service.sent]


def test_jobs_are_sent_as_they_take_least(tmp_path):
    """Four prompts with six cases each, and the rest of the cases: as found by hand."""
    service, cut = FakeService(Clock()), Cutting(parted(1, 40), lambda said: None)
    whole = unit(0, 4, cases=16)
    ((each, found),) = flown(tmp_path / "j.jsonl", service, cut, [whole])
    assert_right(each, found)
    assert sorted(sizes(service), reverse=True) == BY_HAND["jobs are dear"][2]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kill_at", [4, 9])
def test_what_was_cut_is_taken_up_as_it_was_cut(tmp_path, monkeypatch, kill_at, compact):
    """Whatever is expected of the server by then: what is there is not asked for again."""
    service = FakeService(Clock(), kill_at=kill_at)
    with pytest.raises(Killed):
        flown(tmp_path / "j.jsonl", service, Cutting(parted(1, 40), lambda said: None), [unit(0, 4, cases=16)])
    if compact:
        monkeypatch.setattr("selfrepair_nn.backends.ndif.ledger.LONG", 0)
        Ledger(tmp_path / "j.jsonl", "run").compact()
    again = Cutting(parted(10, 4), lambda said: None)
    ((each, found),) = flown(tmp_path / "j.jsonl", service, again, [unit(0, 4, cases=16)])
    assert_right(each, found)
    asked = Counter((p, c) for _, prompts, cases in service.sent for p in prompts for c in cases)
    assert set(asked.values()) == {1}
    assert len(asked) == 64
    assert sizes(service)[0] in {(4, 6), (4, 4)}


@pytest.mark.parametrize("cases", [0, -1, 4, 10**9])
def test_a_ledger_that_cuts_nowhere_halves(tmp_path, cases):
    ledger = Ledger(tmp_path / "j.jsonl", "run")
    ledger.write(SPLIT, unit(0, 4).label, into=[], cases=cases)
    service = FakeService(Clock())
    ((each, found),) = flown(tmp_path / "j.jsonl", service, None, [unit(0, 4)])
    assert_right(each, found)
    assert sizes(service) == [(2, 4), (2, 4)]
