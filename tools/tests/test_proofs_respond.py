"""The chaos runs of the response, some of them, and that they would notice."""

import pytest
from fleet_support import needs_mosquitto
from netns import needs_root
from stonechat_tools.proofs import respond, respond_run


@needs_root
@pytest.mark.slow(12)
def test_some_runs_lock_nobody_out_and_leave_nothing(capsys):
    assert respond.prove(3, respond.T1_S, 3, first=100), capsys.readouterr().out


@needs_mosquitto
@needs_root
@pytest.mark.slow
def test_a_run_with_the_real_daemon_broker_and_collector_locks_nobody_out(capsys):
    assert respond.prove_with_daemon(1, 1), capsys.readouterr().out


@pytest.mark.parametrize(
    ("at_s", "counts"),
    [(9.5, True), (10.0, False), (11.9, False), (12.0 + respond_run.SLACK_S + 0.01, True), (15.0, True)],
)
def test_a_flow_that_is_stopped_without_a_lease_is_a_lock_out(at_s, counts):
    run = respond_run.Run(1, 2)
    run.echoes.close()
    run._heard("applying", 10.0)
    run._heard("applied", 10.001)
    run.stopped_others = [(at_s, at_s, "to the attacker")]
    run.judge()
    assert bool(run.outcome.lock_outs) == counts


def test_the_end_of_a_lease_counts_and_so_does_a_renewal():
    run = respond_run.Run(1, 2)
    run.echoes.close()
    for word, at_s in (("applying", 10.0), ("applied", 10.0), ("renewing", 11.0), ("renewed", 11.0)):
        run._heard(word, at_s)
    assert run.may_stop == [[10.0, 13.0]]
    run._heard("ended", 12.0)
    assert run.may_stop == [[10.0, 12.0]]
    run._heard("applying", 20.0)
    run._heard("refused", 20.5)
    assert run.may_stop == [[10.0, 12.0], [20.0, 20.5]]
