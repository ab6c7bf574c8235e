"""The training benchmark and the profile, run small."""

from types import SimpleNamespace

import pytest


def test_every_case_is_compared_with_its_reference(script, folder, monkeypatch, capsys):
    benchmark = script("benchmark_train")
    small = benchmark.Case("lora", 2, 64, compiled=False, accumulate=2)
    monkeypatch.setattr(benchmark, "CASES", {"small": small})
    benchmark.main(folder, cases=["small"], steps=3)
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert cells[0] == "lora, r 16 on all-linear, 2 × 64, 2 micro-batches a step"
    ours, reference, times = (float(cells[i].replace(",", "")) for i in (1, 8, 10))
    least, most = (ours - 0.5) / (reference + 0.5), (ours + 0.5) / (reference - 0.5)  # as rounded as they are shown
    assert least - 0.005 <= times <= most + 0.005


def test_documents_of_the_benchmark_are_packed_whole(script):
    benchmark = script("benchmark_train")
    rows = benchmark.PackedRows(6, benchmark.Case("lora", 2, 8192))
    assert len(rows) == 6 and all(sum(rows.lengths[i] for i in row) <= 8192 for row in rows.rows)
    assert 0.8 < rows.useful <= 1


def test_idle_time_is_what_no_kernel_covers(script):
    intervals = [(10, 12, "c"), (0, 5, "a"), (2, 4, "b"), (11, 15, "d")]
    busy, gaps = script("profile_fit").busy_and_gaps(intervals)
    assert busy == 10 and gaps == [(5, ("a", "c"))]


@pytest.mark.parametrize(
    ("steps", "batches", "words"), [(13, 600, "training takes 13 steps"), (60, 39, "an epoch takes 13 steps")]
)
def test_a_run_or_an_epoch_too_short_for_idle_time_is_refused(script, steps, batches, words):
    """Steps of two epochs would count the start of the loader's processes as idle time."""
    callback = script("profile_fit").GPUTime()

    def start(steps, batches):
        run = {"estimated_stepping_batches": steps, "num_training_batches": batches, "accumulate_grad_batches": 3}
        callback.on_train_start(SimpleNamespace(**run), None)

    start(14, 42)
    with pytest.raises(ValueError, match=f"{words}: wanted at least 10 to warm up and 4 to record"):
        start(steps, batches)
