"""Mutated files: ModelError or a model that runs, nothing else (`stonechat soak reader` is the long job)."""

import tracemalloc

from stonechat_tools.proofs import fuzz_reader


def test_mutants_are_refused_or_run() -> None:
    tally, findings = fuzz_reader.fuzz(6000, seed=5)
    assert not findings
    assert min(tally["run"], tally["scored"]) > 250 and tally["refused"] > 2500, tally


def test_hostile_plans_on_micropython() -> None:
    told, findings = fuzz_reader.fuzz_board(1500, seed=9)
    assert not findings and told, findings


def test_memory_is_bounded() -> None:
    tracemalloc.start(1)
    try:
        _, findings = fuzz_reader.fuzz(700, seed=6)
        assert not findings
        assert tracemalloc.get_traced_memory()[1] < fuzz_reader.LARGEST_BYTES
    finally:
        tracemalloc.stop()


def test_a_finding_is_told_and_kept(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def broken(data: bytes) -> str:
        raise IndexError("outside")

    monkeypatch.setattr(fuzz_reader, "attempt", broken)
    tally, findings = fuzz_reader.fuzz(3, seed=7, keep=tmp_path)
    assert findings == ["IndexError: outside"] * 3
    assert len(list(tmp_path.iterdir())) == 3 and tally["IndexError: outside"] == 3
