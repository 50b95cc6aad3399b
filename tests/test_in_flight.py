"""Jobs in flight: nothing is lost or sent twice in doubt, whatever the server does and whenever we are killed."""

import pickle
from collections import Counter
from datetime import datetime

import pytest
from fake_service import Clock, FakeService, Killed, assert_right, unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfrepair_nn.backends.ndif.faults import KINDS, Fault
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import Ledger, lines
from selfrepair_nn.errors import Incomplete

UNITS = [unit(0, 4), unit(4, 8), unit(8, 10)]
TIME_LIMIT = "Your job exceeded the execution timeout of 10.0s."
ACTOR_DIED = (
    "Error submitting request to model deployment. Please try again later. Sorry for the inconvenience."
)
RAISED = 'Traceback (most recent call last):\n  File "x.py", line 3\nValueError: too many values to unpack'
BAD_KEY = "Invalid API key."


def flown(path, service, units=UNITS, in_flight=2, patience=1800):
    """All results of one process that runs the units over a ledger, in the order in which they came."""
    ledger = Ledger(path, "run", service.clock)
    flight = JobsInFlight(
        service, ledger, in_flight, patience, clock=service.clock, sleep=service.clock.sleep
    )
    return list(flight(units))


def events(path):
    return Counter(line["event"] for line in lines(path))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.jsonl"


def test_every_unit_comes_back_once_and_is_sent_once(path):
    service = FakeService(Clock())
    found = flown(path, service)
    assert sorted(unit.label for unit, _ in found) == sorted(unit.label for unit in UNITS)
    for each, result in found:
        assert_right(each, result)
    assert len(service.sent) == len(UNITS)
    assert events(path) == {"sending": 3, "sent": 3, "fetched": 3, "taken": 3}


def test_no_more_jobs_are_on_the_server_than_allowed(path):
    service, most = FakeService(Clock()), []
    ask = service.ask
    service.ask = lambda job: (
        most.append(sum(service.clock() < j.done for j in service.jobs.values())),
        ask(job),
    )[1]
    flown(path, service, [unit(i, i + 1) for i in range(9)], in_flight=3)
    assert max(most) == 3


def test_the_id_is_on_disk_before_the_request_goes_out(path):
    service = FakeService(Clock())
    send, seen = service.send, []
    service.send = lambda request, job: (
        seen.append((lines(path)[-1]["event"], lines(path)[-1]["job"], job)),
        send(request, job),
    )[1]
    flown(path, service)
    assert [(event, noted == job) for event, noted, job in seen] == [("sending", True)] * 3


@pytest.mark.parametrize("outcome", ["in doubt", "renamed", "slow"])
def test_what_arrived_is_not_sent_again(path, outcome):
    service = FakeService(Clock(), [outcome])
    assert len(flown(path, service)) == 3
    assert len(service.sent) == 3


@pytest.mark.parametrize(
    "outcome",
    [
        "vanishes",
        "never",
        "unheard",
        "forgotten",
        "expired",
        "crooked",
        "nan",
        "refused",
        ACTOR_DIED,
        TIME_LIMIT,
        RAISED,
    ],
)
def test_after_one_fault_of_any_kind_the_unit_is_sent_again_whole(path, outcome):
    service = FakeService(Clock(), [outcome])
    for each, found in flown(path, service):
        assert_right(each, found)
    assert events(path)["failed"] == 1
    assert events(path)["split"] == 0
    arrived = outcome not in ("vanishes", "refused")
    assert Counter(map(str, service.sent)).most_common(1)[0][1] == 1 + arrived


def test_a_job_that_the_server_had_and_has_no_more_is_sent_again_soon(path):
    service = FakeService(Clock(), ["forgotten"])
    flown(path, service)
    failed = next(each for each in lines(path) if each["event"] == "failed")
    assert failed["kind"] == "forgotten"
    assert "RUNNING" in failed["text"]
    waited = datetime.fromisoformat(failed["time"]).timestamp() - Clock().now
    assert waited < 10


def test_a_request_in_doubt_is_given_time_to_appear_before_another_goes_out(path):
    service = FakeService(Clock(), ["vanishes"])
    flown(path, service)
    sending = [each for each in lines(path) if each["event"] == "sending" and each["part"] == UNITS[0].label]
    assert len(sending) == 2
    failed = next(each for each in lines(path) if each["event"] == "failed")
    assert failed["kind"] == "unheard"
    waited = datetime.fromisoformat(sending[1]["time"]) - datetime.fromisoformat(sending[0]["time"])
    assert waited.total_seconds() > 60


@pytest.mark.parametrize("capacity", [8, 3, 1])
def test_what_is_too_much_for_the_server_is_split_until_it_fits(path, capacity):
    service = FakeService(Clock(), capacity=capacity)
    found = flown(path, service)
    assert len(found) == 3
    for each, result in found:
        assert_right(each, result)
    fitting = [u for u in service.sent if len(u[1]) * len(u[2]) <= capacity]
    too_much = Counter(str(u) for u in service.sent if len(u[1]) * len(u[2]) > capacity)
    assert fitting
    assert set(too_much.values()) == {2}
    assert all(count == 1 for count in Counter(map(str, fitting)).values())


def test_what_fits_in_no_way_is_given_up_and_the_rest_comes_back(path):
    service = FakeService(Clock())
    ask = service.ask

    def without_prompt_nine(job):
        answer = ask(job)
        broken = (
            answer
            and answer.status == "COMPLETED"
            and 9 in service.jobs[job].unit[1]
            and 3 in service.jobs[job].unit[2]
        )
        return type(answer)("ERROR", TIME_LIMIT, None) if broken else answer

    service.ask = without_prompt_nine
    ledger = Ledger(path, "run", service.clock)
    flight = JobsInFlight(service, ledger, 2, 1800, clock=service.clock, sleep=service.clock.sleep)
    came = []
    with pytest.raises(Incomplete, match="1 unit of work is missing") as error:
        came.extend(each.label for each, _ in flight(UNITS))
    assert sorted(came) == [UNITS[0].label, UNITS[1].label]
    assert "prompts 9 to 9, cases 3 to 3" in str(error.value)
    assert "exceeded the server's time limit" in str(error.value)
    assert error.value.exit_code == 75
    service.ask = ask
    assert [u.label for u, _ in flown(path, service, UNITS[2:])] == [UNITS[2].label]


def test_a_dead_server_is_not_asked_for_ever(path):
    service = FakeService(Clock(), ["never"] * 100)
    began = service.clock()
    with pytest.raises(Incomplete, match="nothing more was heard of the job") as error:
        flown(path, service, [unit(i, i + 1) for i in range(50)], patience=100)
    assert "50 units of work are missing" in str(error.value)
    assert "not tried" in str(error.value)
    assert service.clock() - began < 1000
    assert len(service.sent) < 15


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].attempts])
def test_what_another_attempt_cannot_mend_ends_the_run_at_once(path, kind):
    service = FakeService(Clock())

    def refuse(request, job):
        raise Fault(kind, "no")

    service.send = refuse
    with pytest.raises(Incomplete if KINDS[kind].passes else Fault):
        flown(path, service)
    assert events(path)["sending"] == 1


def test_a_refusal_while_a_job_runs_leaves_the_job_in_the_ledger(path):
    """A key that is withdrawn: once it is given back, the job that ran on is taken up, not sent again."""
    service = FakeService(Clock(), ["slow"])
    ask, asked = service.ask, []

    def locked(job):
        asked.append(job)
        if len(asked) > 3:
            raise Fault("key", BAD_KEY)
        return ask(job)

    service.ask = locked
    with pytest.raises(Fault):
        flown(path, service, UNITS[:1])
    service.ask = ask
    assert len(flown(path, service, UNITS[:1])) == 1
    assert len(service.sent) == 1


def test_a_restart_takes_up_what_is_on_the_server(path):
    service = FakeService(Clock(), ["slow", "slow"], kill_at=20)
    with pytest.raises(Killed):
        flown(path, service)
    assert len(service.sent) == 2
    service.clock.sleep(3600)
    assert len(flown(path, service)) == 3
    assert len(service.sent) == 3


def test_a_ledger_of_another_run_of_the_same_path_is_not_believed(path):
    service = FakeService(Clock())
    flown(path, service)
    other = Ledger(path, "another", service.clock)
    assert not other.records
    assert (
        len(
            list(JobsInFlight(service, other, 2, 1800, clock=service.clock, sleep=service.clock.sleep)(UNITS))
        )
        == 3
    )
    assert len(service.sent) == 6


OUTCOMES = st.sampled_from(
    [
        "ok",
        "ok",
        "ok",
        "slow",
        "in doubt",
        "renamed",
        "vanishes",
        "forgotten",
        "expired",
        "refused",
        ACTOR_DIED,
        "never",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outcomes=st.lists(OUTCOMES, max_size=8),
    kills=st.lists(st.integers(0, 60), max_size=6),
    in_flight=st.integers(1, 4),
    capacity=st.sampled_from([1, 3, 16]),
)
def test_whatever_happens_everything_comes_back_and_nothing_is_sent_twice_in_doubt(
    tmp_path_factory, outcomes, kills, in_flight, capacity
):
    """Faults in any order and kills at any step; each process takes what the one before it left."""
    path = tmp_path_factory.mktemp("flight") / "jobs.jsonl"
    service, stored = FakeService(Clock(), list(outcomes), capacity), {}
    _watch(service)
    for kill in [*kills, None]:
        service.kill_at = None if kill is None else service.steps + kill
        _one_process(path, service, stored, in_flight)
    for _ in range(len(outcomes)):  # what was given up is tried again by the same command
        _one_process(path, service, stored, in_flight)
    assert sorted(stored) == sorted(u.label for u in UNITS)
    for each in UNITS:
        assert_right(each, stored[each.label])


def _one_process(path, service, stored, in_flight):
    ledger = Ledger(path, "run", service.clock)
    missing = [u for u in UNITS if u.label not in stored]
    flight = JobsInFlight(service, ledger, in_flight, 1800, clock=service.clock, sleep=service.clock.sleep)
    try:
        for each, found in flight(missing):
            service.step()
            stored[each.label] = found
    except (Killed, Incomplete):
        pass


def _watch(service):
    """No request goes out while the server has a job of the same part that may still come back.

    But where a server gives a job another id and the client is killed before it hears of it, nobody can know.
    """
    send = service.send

    def watched(request, job):
        part = pickle.loads(request)
        fine = [
            (name, each) for name, each in service.jobs.items() if each.outcome in ("ok", "slow", "in doubt")
        ]
        alive = [name for name, each in fine if each.unit == part and _fits(service, each)]
        assert not alive, f"{part} is sent again although {alive} comes back"
        return send(request, job)

    service.send = watched


def _fits(service, job):
    return len(job.unit[1]) * len(job.unit[2]) <= service.capacity
