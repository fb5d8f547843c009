"""The trials of a comparison with a clock and processes of the test: order, budget, pruning, and the same draws after a kill."""

import json
from types import SimpleNamespace

import optuna
import pytest

from onerec_hf.workflows.compare import search as module
from onerec_hf.workflows.compare.families import Family
from onerec_hf.workflows.compare.processes import Processes, Run
from onerec_hf.workflows.compare.search import STOPPED, VALUE, Search, run_trials

SPACE = {"learning_rate": {"low": 0.0, "high": 1.0}, "size": [{"width": 8}, {"width": 16, "depth": 2}]}


class Clock:
    """Time, which passes while the search sleeps; runs last as long as their family says, and their value is their learning rate."""

    def __init__(self, jobs=1, seconds=None, curve=None):
        self.now, self.jobs, self.seconds, self.curve = 0.0, jobs, seconds or {}, curve
        self.running, self.started, self.stopped = {}, [], []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += 1

    @property
    def free(self):
        return len(self.running) < self.jobs

    @property
    def runs(self):
        return list(self.running)

    def start(self, run):
        self.started.append((run.family, run.number))
        self.running[run] = SimpleNamespace(since=self.now, said=0)

    def ended(self):
        done = [run for run in self.running if self.now - self.running[run].since >= self.seconds.get(run.family, 10)]
        return [(run, self.write(run)) for run in done]

    def write(self, run):
        del self.running[run]
        value = run.spec["settings"].get("learning_rate", 0.5)
        lines = [{"step": step, "value": self.curve(value, step)} for step in range(1, 9)] if self.curve else []
        found = {
            "state": "finished",
            "metrics": {VALUE: value},
            "seconds": self.seconds.get(run.family, 10),
            "evaluations": lines,
        }
        run.path.write_text(json.dumps({"spec": run.spec, **found}))
        return found

    def progress(self):
        said = []
        for run, state in self.running.items():
            while self.curve and state.said < min(8, self.now - state.since):
                state.said += 1
                value = self.curve(run.spec["settings"]["learning_rate"], state.said)
                said.append((run, {"step": state.said, "value": value}))
        return said

    def stop(self, run, state, reason):
        del self.running[run]
        self.stopped.append((run.family, run.number, state))
        found = {"state": state, "reason": reason, "seconds": 1, "evaluations": []}
        if state == "pruned":
            run.path.write_text(json.dumps({"spec": run.spec, **found}))
        return found


@pytest.fixture
def searches(tmp_path, monkeypatch):
    """`searches(clock, trials, a=SPACE, ...)` for families of these names."""

    def make(clock, trials, **spaces):
        monkeypatch.setattr(module, "time", clock)

        def run(family, number, settings):
            path = tmp_path / f"{family.name}-{number}.json"
            spec = {"settings": settings, "result": str(path), "keep": False}
            return Run(path.stem, family.name, number, spec)

        families = [Family(name, name.upper(), "sequential", space=space) for name, space in spaces.items()]
        return [Search(family, trials, 0, run) for family in families]

    return make


def test_trials_go_round_the_families(searches):
    clock = Clock(seconds={"a": 30, "b": 3})
    assert run_trials(searches(clock, 3, a=SPACE, b=SPACE, c={}), clock, 1, None) == 3
    assert clock.started == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_several_at_a_time_are_never_more(searches):
    clock = Clock(jobs=3)
    start, most = clock.start, []
    clock.start = lambda run: (start(run), most.append(len(clock.running)))
    run_trials(searches(clock, 4, a=SPACE, b=SPACE), clock, 1, None)
    assert max(most) == 3
    assert len(clock.started) == 8


def test_the_best_trial_wins_and_mappings_set_several_settings(searches):
    clock = Clock()
    (one,) = searches(clock, 6, a=SPACE)
    run_trials([one], clock, 1, None)
    rates = [found["metrics"][VALUE] for _, found in sorted(one.found.items())]
    assert len(set(rates)) == 6
    assert one.best() == max(range(6), key=rates.__getitem__)
    assert one.best(2) == max(range(2), key=rates.__getitem__)
    sizes = {
        json.dumps({k: v for k, v in f["spec"]["settings"].items() if k != "learning_rate"})
        for f in map(read, paths(one))
    }
    assert sizes <= {'{"width": 8}', '{"width": 16, "depth": 2}'}


def paths(one):
    return [one.make_run(one.family, number, {}).path for number in sorted(one.found)]


def read(path):
    return json.loads(path.read_text())


def test_after_a_kill_the_same_trials_follow(searches):
    clock = Clock()
    (whole,) = searches(clock, 5, a=SPACE)
    run_trials([whole], clock, 1, None)
    wanted = [read(path) for path in paths(whole)]
    for path in paths(whole)[2:]:  # the third one was under way
        path.unlink()
    clock = Clock()
    (again,) = searches(clock, 5, a=SPACE)
    run_trials([again], clock, 1, None)
    assert clock.started == [("a", 2), ("a", 3), ("a", 4)]
    assert [read(path)["spec"] for path in paths(again)] == [found["spec"] for found in wanted]
    clock = Clock()  # nothing is left to do
    (last,) = searches(clock, 5, a=SPACE)
    run_trials([last], clock, 1, None)
    assert clock.started == []
    assert last.best() == whole.best()


def test_a_trial_that_falls_behind_is_pruned(searches):
    clock = Clock(seconds={"a": 9}, curve=lambda rate, step: rate * step)
    (one,) = searches(clock, 12, a={"learning_rate": {"low": 0.0, "high": 1.0}})
    run_trials([one], clock, 1, None)
    states = [found["state"] for _, found in sorted(one.found.items())]
    assert states[:3] == ["finished"] * 3
    assert states.count("pruned") >= 2
    pruned = [trial for trial in one.study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert min(trial.last_step for trial in pruned) == 3  # two evaluations are not compared
    assert (
        "behind the median of the other trials at evaluation 3"
        in {one.found[trial.number]["reason"] for trial in pruned}.pop()
    )
    assert one.count() == 12
    clock = Clock(seconds={"a": 9}, curve=clock.curve)
    (again,) = searches(clock, 12, a={"learning_rate": {"low": 0.0, "high": 1.0}})
    run_trials([again], clock, 1, None)
    assert clock.started == []
    assert [trial.params for trial in again.study.trials] == [trial.params for trial in one.study.trials]
    for trial, other in zip(again.study.trials, one.study.trials, strict=True):
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert trial.intermediate_values == other.intermediate_values


def test_the_budget_keeps_time_for_the_winners(searches):
    """20 seconds a round: three rounds and three winners of each fit into 125 seconds, a fourth round does not."""
    clock = Clock()
    found = searches(clock, 8, a=SPACE, b=SPACE)
    assert run_trials(found, clock, 3, 130.0) == 3
    assert len(clock.started) == 6
    assert not clock.stopped
    assert {one.count() for one in found} == {3}


def test_a_budget_that_ends_in_the_first_round_stops_what_runs(searches):
    clock = Clock(seconds={"a": 10, "b": 1000})
    fast, slow, late = searches(clock, 8, a=SPACE, b=SPACE, c=SPACE)
    assert run_trials([fast, slow, late], clock, 3, 60.0) == 1
    assert clock.stopped == [("b", 0, "stopped")]
    assert (fast.best(), slow.best(), late.best()) == (0, None, None)
    assert (fast.count(), slow.count(), late.count()) == (1, 0, 0)
    assert slow.reason() == late.reason() == STOPPED
    clock = Clock(seconds={"a": 10, "b": 20})  # a stopped run has no file and runs again
    again = searches(clock, 1, a=SPACE, b=SPACE, c=SPACE)
    assert run_trials(again, clock, 3, None) == 1
    assert clock.started == [("b", 0), ("c", 0)]


def test_processes_end_and_say_why(tmp_path):
    """A run that fails says why in its file and its log; one that is stopped is gone with its folder."""

    def run(name, keep=False):
        folder = tmp_path / "scratch" / name
        folder.mkdir(parents=True)
        paths = {"result": f"{tmp_path}/{name}.json", "progress": f"{tmp_path}/{name}.progress", "folder": str(folder)}
        return Run(name, name, 0, {**paths, "keep": keep})

    wrong, long = run("wrong", keep=True), run("long")
    (tmp_path / "long.progress").write_text(
        '{"step": 1, "value": 0.5, "cpu_seconds": 9.0}\n'
    )  # of a killed comparison
    with Processes(3) as processes:
        processes.start(wrong)  # a spec without a family
        processes.start(long)
        assert not processes.progress()
        found = processes.stop(long, "stopped", "time is up")
        assert (found["state"], found["reason"]) == ("stopped", "time is up")
        assert processes.runs == [wrong]
        assert not (tmp_path / "scratch" / "long").exists()
        while processes.runs:
            for ended, result in processes.ended():
                assert ended is wrong
                assert result["state"] == "failed"
                assert "KeyError: 'family'" in result["reason"]
        assert "Traceback" in (tmp_path / "wrong.log").read_text()
    assert not processes.runs
