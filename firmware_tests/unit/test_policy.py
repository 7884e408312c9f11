from stonechat.errors import ConfigError
from stonechat.policy import (
    ALERT,
    FILES,
    HOOK,
    MACHINE,
    NETWORK,
    PROGRAMS,
    QUARANTINE,
    RULES,
    THROTTLE,
    History,
    check,
    decide,
    families_of,
    seconds_of,
)

TABLE = bytes((NETWORK, NETWORK, FILES, PROGRAMS, MACHINE))


def decided(rules, windows):
    """windows: (level, families) each -> the actions due in each window; every one is carried out at once."""
    history = History(rules)
    seen = []
    for now_s in range(len(windows)):
        due = decide(rules, history, *windows[now_s])
        for rule in due:
            history.carried_out(rule, now_s)
        seen.append([rules[rule][0] for rule in due])
    return seen


def test_the_rules_of_the_package_throttle_first_and_stop_then():
    check(RULES)
    assert decided(RULES, [(2, NETWORK)] * 5) == [[HOOK, THROTTLE], [], [], [QUARANTINE], []]


def test_nothing_is_due_below_the_level():
    assert decided(RULES, [(0, NETWORK), (1, NETWORK)] * 20) == [[]] * 40


def test_a_rule_is_due_again_only_after_its_level_has_ended():
    rules = ((THROTTLE, 2, NETWORK, 0, 10, 10),)
    assert decided(rules, [(2, NETWORK), (2, NETWORK), (1, 0), (2, NETWORK)]) == [[THROTTLE], [], [], [THROTTLE]]


def test_what_was_not_carried_out_stays_due():
    rules = ((THROTTLE, 2, NETWORK, 0, 10, 10),)
    history = History(rules)
    assert decide(rules, history, 2, NETWORK) == [0]
    assert decide(rules, history, 2, 0) == [0]  # the family was named in this alarm
    assert decide(rules, history, 0, 0) == []


def test_a_response_of_the_network_waits_for_a_feature_of_the_network():
    rules = ((QUARANTINE, 2, NETWORK, 0, 10, 10), (HOOK, 2, FILES | PROGRAMS, 0, 0, 0))
    assert decided(rules, [(2, FILES)] * 3 + [(2, NETWORK | FILES)]) == [[HOOK], [], [], [QUARANTINE]]


def test_a_rule_of_the_level_watch_needs_its_windows_in_a_row():
    rules = ((ALERT, 1, 0, 2, 0, 0),)
    assert decided(rules, [(1, 0), (1, 0), (0, 0), (1, 0), (2, 0), (1, 0), (1, 0)]) == [[]] * 5 + [[ALERT], []]


def test_a_family_counts_from_a_quarter_of_the_score():
    assert families_of([(0, 40, 30), (2, 40, 20), (3, 40, 5)], TABLE) == NETWORK
    assert families_of([(0, 40, 15), (1, -9, 15), (2, 40, 60)], TABLE) == NETWORK | FILES
    assert families_of([(200, 40, 90)], TABLE) == 0 and families_of([], TABLE) == 0


def test_leases_grow_to_the_cap_and_shrink_after_a_day():
    rule = (QUARANTINE, 2, NETWORK, 0, 120, 480)
    assert [seconds_of(rule, leases, 100) for leases in range(5)] == [120, 240, 480, 480, 480]
    assert seconds_of(rule, 1000, 100) == 480 and seconds_of(rule, 3, 86_400) == 120
    assert seconds_of((QUARANTINE, 2, NETWORK, 0, 100, 150), 1, 5) == 150
    history = History((rule,))
    for now_s, leases in ((10, 1), (500, 2), (86_899, 3), (173_299, 1)):
        history.carried_out(0, now_s)
        assert history.leases == [leases], now_s


def test_rules_out_of_range_are_refused():
    good = [THROTTLE, 2, NETWORK, 0, 120, 480]
    check((tuple(good),))
    for place, wrong in (
        (0, 0),
        (0, 5),
        (1, 0),
        (1, 3),
        (2, 16),
        (2, -1),
        (3, -1),
        (3, 1001),
        (4, 0),
        (4, 481),
        (5, 3601),
    ):
        rule = list(good)
        rule[place] = wrong
        try:
            check((tuple(good), tuple(rule)))
        except ConfigError as error:
            assert "rule 2" in str(error)
        else:
            raise AssertionError(rule)
    try:
        check((tuple(good),) * 17)
    except ConfigError:
        return
    raise AssertionError("17 rules")
